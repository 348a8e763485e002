cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.parking cimport Parking
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool

cdef class Driver(Parking):
    cdef int64_t perform(self, Request request) except? -4096
    cdef int64_t perform_by_thread(self, Request request, Pool pool) except? -4096
    cdef int begin(self, Request request, bint more) except -1
    cdef int begin_by_thread(self, Request request, Pool pool) except -1
    cdef int64_t end(self, Request request) except? -4096

    @cython.final
    cdef int64_t _result(self, Request request, current, uint64_t now=*) except? -4096
