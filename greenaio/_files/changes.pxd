from libc.stdint cimport int64_t, uint64_t

from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool
from greenaio._files.route cimport Known

cdef (uint64_t, uint64_t) in_pages(uint64_t start, uint64_t end) noexcept
cdef bint takes_turn(Known known, Request request) except -1
cdef object hold_range(int fd, Known known, start, end)
cdef object hold_to(int fd, Known known, uint64_t start, uint64_t end)
cdef object shield_in(mine, int fd, work)
cdef object work_in(mine, int fd, work)
cdef object change(int fd, Known known, int64_t start, Request request, Pool pool=*)
cdef int64_t truncate_file(int fd, Known known, int64_t length, mine) except? -4096
cdef int64_t fallocate_file(int fd, Known known, int mode, int64_t offset, int64_t length, mine) except? -4096
