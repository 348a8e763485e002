from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport Context
from greenaio._core.request cimport Request, RequestList, Share
from greenaio._core.tally cimport Tally

cdef class Engine(Tally):
    cdef readonly Context context
    cdef readonly RequestList pending
    cdef readonly RequestList in_flight
    cdef readonly RequestList lent      # with native threads
    cdef readonly RequestList declined  # to be moved to their next ways ...
    cdef readonly RequestList moving    # ... which they are asked for
    cdef readonly RequestList ready     # DONE, not yet handed over
    cdef readonly dict shares           # by device
    cdef readonly bint blocked          # the kernel is full: the next completion submits
    cdef readonly int depth
    cdef int burst                      # so many may wait for each other, if there is anything in flight; 0 in a pass
    cdef bint is_instant                # what was submitted last was done by the time that it was submitted
    cdef object _device                 # asked for last
    cdef Share _share                   # of it
    cdef readonly uint64_t slow_ns      # how long the last slow submission took
    cdef readonly int slow_batch        # and how many requests it had
    cdef uint64_t reaped_ns            # when what is being reaped was done, or a little later; 0: not known
    cdef bint _to_close                 # a request that the kernel has taken is the last to need a number
    cdef int _singly                    # so many more are offered one by one, to find who stalls
    cdef uint64_t submitted_ns          # what the clock said after the last io_submit
    cdef readonly Request culprit       # the first found of those, until the driver takes it
    cdef readonly uint64_t culprit_ns   # how long it took

    cdef void reaps(self) noexcept
    cdef void _time(self, Request request, int way, int64_t result) noexcept
    cdef void _taken(self, Request request) noexcept
    cdef int _close_numbers(self) except -1
    cdef void finish(self, Request request, int64_t result) noexcept
    cdef void _unqueue(self, Request request) noexcept
    cdef void _end(self, Request request, int64_t result) noexcept
    cdef void _leave_share(self, Request request) noexcept
    cdef Request next_declined(self)
    cdef void _undecline(self, Request request) noexcept
    cdef void settle(self, Request request, int64_t result) noexcept
    cdef int enqueue_again(self, Request request) except -1
    cdef int cancel_declined(self, int64_t result) noexcept
    cdef void lend(self, Request request) noexcept
    cdef void take_back(self, Request request) noexcept
    cdef Share share(self, device, int limit)
    cdef int batch_limit(self, Request request) noexcept
    cpdef bint enqueue(self, Request request) except -1
    cpdef int flush(self) except -1
    cpdef int reap(self) except -1
    cpdef bint withdraw(self, Request request) except -1
    cpdef int refuse(self, int code) except -1
    cpdef int cancel(self, int code) except -1
    cdef long _offer(self) except? -4096
    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept
    cpdef Request take_culprit(self)
