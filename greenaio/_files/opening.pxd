from libc.stdint cimport int64_t

from greenaio._core.driver cimport Driver
from greenaio._core.job cimport chain
from greenaio._files.route cimport Known
from greenaio._files.walk cimport Walk

cdef int open_file(object path, int flags, int mode, int dir_fd, object io_mode=*, Known known=*) except -1
cdef int64_t walk_there(Driver driver, Walk walk, str name, chain call) except? -4096
