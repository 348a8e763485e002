cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t

from greenaio._core.dispatch cimport Dispatcher
from greenaio._core.request cimport Request

cdef class Parking(Dispatcher):
    # The number of greenlets that are parked here.
    cdef readonly int waiting
    # The number of forks between this process and the one that made the driver.
    cdef readonly int forks

    cdef object park(self, Request request, current)
    cdef object caller(self)
    cdef int check_caller(self) except -1
    cdef int end_in_line(self) except -1
    cdef bint run_is_over(self, int limit=*, uint64_t now=*) noexcept

    # For parking.pyx alone.
    @cython.final
    cdef PyObject *_next(self) noexcept
    @cython.final
    cdef int _leave(self, Request request) except -1
    @cython.final
    cdef int _wake(self, Request request) except -1
    @cython.final
    cdef int _drain(self) except -1
    @cython.final
    cdef bint _more_is_ready(self) except -1

    # `hub.HubDriver` implements these, because it knows the loop.
    cdef int hold_loop(self) except -1
    cdef int let_go_of_loop(self) except -1
