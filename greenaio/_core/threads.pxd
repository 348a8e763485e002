from greenaio._core.request cimport Request
from greenaio._core.mailbox cimport Inbox
from greenaio._core.worker cimport pool

cdef class Pool:
    cdef pool *_pool
    # An `st_dev`. None: for calls that wait for no disk.
    cdef readonly object device

    cpdef int submit(self, Request request, Inbox inbox) except -1
    cdef bint all_busy(self) noexcept
    cdef bint is_wary(self) noexcept
    cdef void beware(self) noexcept
    cdef void forgive(self) noexcept
    cdef int busy(self) noexcept
    cdef void retire(self) noexcept
    cdef bint is_over(self) noexcept

cdef bint any_busy() noexcept
cdef bint withdraw(Request request) noexcept
