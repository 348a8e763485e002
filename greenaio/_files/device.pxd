from libc.stdint cimport uint64_t

from greenaio._core.dispatch cimport Way
from greenaio._core.threads cimport Pool

cdef class Nowait:
    # One bit for each of the last 64 answers: 1 if it was a refusal.
    cdef uint64_t _history
    # One bit for each of the last 64 answers: 1 if it was EOPNOTSUPP.
    cdef uint64_t _unknown
    cdef uint64_t _pause_until          # CLOCK_MONOTONIC, ns
    cdef uint64_t _length               # the next pause, ns

    cdef bint asks(self) noexcept
    cdef bint is_unsupported(self) noexcept
    cdef void _count(self, bint refused, bint is_unknown) noexcept
    cpdef void answered(self, bint again) noexcept
    cpdef void unsupported(self) noexcept

cdef class Device:
    cdef readonly object number
    cdef readonly str file_system
    cdef readonly bint in_memory
    # The kernel may swap the bytes of its files out to a disk.
    cdef readonly bint is_swapped
    # Its files have no stored bytes: the kernel makes the answer to each read.
    cdef readonly bint answers
    # No server is told of a read or a close.
    cdef readonly bint is_local
    # The name of its file system is not known yet.
    cdef readonly bint is_guess
    cdef readonly int limit
    cdef readonly Nowait reads
    cdef readonly Nowait writes

    cdef int has(self, str file_system) except -1
    cdef Pool pool(self)
    cdef Way way(self, Nowait direction) noexcept

cdef Device device_of(uint64_t number, uint64_t mount=*)
cdef int forget_answers() except -1
cdef int waited_in_hub(int fd, uint64_t began) except -1

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    /* Return the time of the last tick in ns, up to 10 ms ago. It costs a tenth of the exact time. */
    static inline uint64_t coarse_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        return now.tv_sec * 1000000000ull + now.tv_nsec;
    }
    """
    uint64_t coarse_ns() nogil
