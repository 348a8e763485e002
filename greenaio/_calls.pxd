from libc.stdint cimport int64_t

from greenaio._route cimport Device

cdef extern from "<fcntl.h>":
    const int AT_FDCWD

cdef int open_file(object path, int flags, int mode, int dir_fd, object io_mode=*) except -1
cdef int64_t truncate_file(int fd, Device device, int64_t length) except? -4096
cdef int64_t fallocate_file(int fd, Device device, int mode, int64_t offset, int64_t length) except? -4096
cdef int close_file(int fd, bint may_wait, bint is_forgotten=*) except -1
