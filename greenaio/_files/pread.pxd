from libc.stdint cimport int64_t

from greenaio._files.route cimport Known

cdef object read_bytes(int fd, Known known, Py_ssize_t n, int64_t offset, name, int max_batch)
