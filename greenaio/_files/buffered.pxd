from libc.stdint cimport int64_t

from greenaio._core.driver cimport Driver
from greenaio._core.request cimport Request
from greenaio._files.route cimport Known

cdef extern from *:
    """
    #include <fcntl.h>

    /* Return whether *fd* is open with O_DIRECT; no if it is not open, because a read will say so. */
    static inline int fd_is_direct(int fd)
    { int flags = fcntl(fd, F_GETFL); return flags >= 0 && flags & O_DIRECT; }
    """
    bint fd_is_direct(int fd)

cdef int64_t read_answer(Driver driver, Request request, Known known, memory) except? -4096
cdef int64_t read_buffered(Driver driver, Request request, Known known, memory) except? -4096
cdef int64_t write_buffered(Driver driver, Request request, Known known) except? -4096
cdef int64_t read_at_position(int fd, Known known, buffer) except? -4096
