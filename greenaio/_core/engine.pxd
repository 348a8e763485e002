from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport Context
from greenaio._core.request cimport Request, RequestList, Share
from greenaio._core.tally cimport Tally

cdef class Engine(Tally):
    cdef readonly Context context

    # The places of a request: see the table in request.pyx. A list owns its requests.
    cdef readonly RequestList pending
    cdef readonly RequestList in_flight
    # `lent` requests are with native threads. `declined` ones wait for their next way. The next way of the
    # `moving` ones is being chosen. `ready` ones are DONE and not yet handed over.
    cdef readonly RequestList lent
    cdef readonly RequestList declined
    cdef readonly RequestList moving
    cdef readonly RequestList ready

    # The `Share` of each device.
    cdef readonly dict shares
    # The kernel is full, so the next completion has to submit the pending requests.
    cdef readonly bint blocked
    # The number of requests that may be in flight at once.
    cdef readonly int depth
    # The number of requests that may wait for each other while any request is in flight. The driver sets it
    # to 0 during a pass, because a pass may be long, and the device must not run dry in that time.
    cdef int burst
    # The last submission left nothing in flight, so the device does its work inside io_submit.
    cdef bint is_instant
    # The device that was asked for last, and its share.
    cdef object _device
    cdef Share _share
    # The last slow submission: how long it took, and how
    # many requests it had. The driver resets `slow_ns` to 0.
    cdef readonly uint64_t slow_ns
    cdef readonly int slow_batch
    # The time at which the completions that are being reaped
    # were done, or a little later, in ns; 0: not known.
    cdef uint64_t reaped_ns
    # A request in flight is the last user of a number that is being closed: `flush` closes it at its end.
    cdef bint _to_close
    # The number of requests that are still to be offered one by one, to find the one that stalls.
    cdef int _singly
    # The time after the last io_submit, in ns.
    cdef uint64_t submitted_ns
    # The first request that stalled when it went alone, until the driver takes it, and how long its
    # submission took, in ns.
    cdef readonly Request culprit
    cdef readonly uint64_t culprit_ns

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
