from libc.stdint cimport uint64_t

from greenaio._threads cimport Pool

cdef enum Way:
    ASK         # native AIO with RWF_NOWAIT: what would wait comes back as EAGAIN
    PLAIN       # native AIO: it does not wait here, or there is no way to ask
    THREAD

cdef class Nowait:
    cdef bint _unknown
    cdef uint64_t _history
    cdef uint64_t _pause_until

    cdef bint asks(self) noexcept
    cdef void answered(self, bint again) noexcept

cdef class Device:
    cdef readonly object number
    cdef readonly str file_system
    cdef readonly bint in_memory
    cdef readonly int limit
    cdef readonly Nowait reads
    cdef readonly Nowait writes

    cdef Pool pool(self)
    cdef Way way(self, Nowait direction) noexcept

cdef Device device_of(uint64_t number)
