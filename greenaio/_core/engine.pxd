cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.queues cimport Queues
from greenaio._core.request cimport Request

@cython.final
cdef class Engine(Queues):
    # The number of requests that may wait for each other while any request is in flight. The driver sets it
    # to 0 during a pass, because a pass may be long, and the device must not run dry in that time.
    cdef int burst
    # The last submission left nothing in flight, so the device does its work inside io_submit.
    cdef bint is_instant
    # The last slow submission: how long it took, and how
    # many requests it had. The driver resets `slow_ns` to 0.
    cdef readonly uint64_t slow_ns
    cdef readonly int slow_batch
    # The number of requests that are still to be offered one by one, to find the one that stalls.
    cdef int _singly
    # The time after the last io_submit, in ns.
    cdef uint64_t submitted_ns
    # The first request that stalled when it went alone, until the driver takes it, and how long its
    # submission took, in ns.
    cdef readonly Request culprit
    cdef readonly uint64_t culprit_ns

    cpdef bint enqueue(self, Request request) except -1
    cdef int enqueue_again(self, Request request) except -1
    cpdef int flush(self) except -1
    cpdef int reap(self) except -1
    cdef void reaps(self) noexcept
    cpdef Request take_culprit(self)

    cdef int _batch_limit(self, Request request) noexcept
    cdef int _stage(self, Request request) except -1
    cdef long _offer(self) except? -4096
    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept
    cdef int _close_numbers(self) except -1
