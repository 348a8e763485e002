from libc.stdint cimport int64_t, uint64_t

from greenaio._core.driver cimport Driver
from greenaio._core.request cimport Request
from greenaio._files.route cimport Known

cdef int64_t by_aio(Driver driver, Request request, Known known) except? -4096
cdef int64_t direct(Driver driver, Request request, Known known) except? -4096
cdef bint is_misaligned(Known known, Request request) noexcept
cdef int64_t read_misaligned(Driver driver, Known known, Request asked, buffers) except? -4096
cdef object write_misaligned(Known known, Request asked, buffers)

cdef inline int64_t misfit(Known known, int64_t n) noexcept:
    """Return the distance of *n* from the last border of a sector, in bytes. In memory each offset fits."""
    return 0 if known.device.in_memory else n & (known.align - 1)

cdef inline int64_t whole_sectors(Known known, uint64_t nbytes) noexcept:
    """Return *nbytes*, rounded up to whole sectors."""
    cdef uint64_t more = known.align - 1
    return (nbytes + more) & ~more
