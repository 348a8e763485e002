from libc.stdint cimport int64_t

from greenaio._files.route cimport Known

cdef object vectored(bint reading, int fd, Known known, asked, int64_t offset, int flags, name, int max_batch)
cdef object sync(int fd, Known known, int opcode, name)
