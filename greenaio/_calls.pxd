cdef extern from "<fcntl.h>":
    const int AT_FDCWD

cdef int open_file(object path, int flags, int mode, int dir_fd) except -1
cdef int close_file(int fd, bint may_wait) except -1
