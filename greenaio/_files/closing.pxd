from greenaio._files.route cimport Known

cdef int close_file(int fd, bint may_wait, bint is_forgotten=*, Known known=*) except -1
