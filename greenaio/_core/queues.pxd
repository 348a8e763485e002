cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport Context
from greenaio._core.request cimport Request, RequestList, Share
from greenaio._core.tally cimport Tally

cdef class Queues(Tally):
    # The kernel. The queues ask it only for the time.
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
    # The device that was asked for last, and its share.
    cdef object _device
    cdef Share _share
    # The kernel is full, so the next completion has to submit the pending requests.
    cdef readonly bint blocked
    # The number of requests that may be in flight at once.
    cdef readonly int depth
    # The time at which the completions that are being reaped
    # were done, or a little later, in ns; 0: not known.
    cdef uint64_t reaped_ns
    # A request in flight is the last user of a number that is being closed: `flush` closes it at its end.
    cdef bint to_close

    cpdef Share share(self, device, int limit)
    cdef bint queue(self, Request request) except -1
    cdef void taken(self, Request request) noexcept
    cdef void finish(self, Request request, int64_t result) noexcept
    cdef Request next_declined(self)
    cdef void settle(self, Request request, int64_t result) noexcept
    cdef int cancel_declined(self, int64_t result) noexcept
    cdef void lend(self, Request request) noexcept
    cdef void take_back(self, Request request) noexcept
    cpdef bint withdraw(self, Request request) except -1
    cpdef int refuse(self, int code) except -1
    cpdef int cancel(self, int code) except -1
    cdef void undecline(self, Request request) noexcept

    @cython.final
    cdef void _time(self, Request request, int way, int64_t result) noexcept
    @cython.final
    cdef void _unqueue(self, Request request) noexcept
    @cython.final
    cdef void _end(self, Request request, int64_t result) noexcept
    @cython.final
    cdef void _leave_share(self, Request request) noexcept
