from greenaio._core.handle cimport Handle
from greenaio._files.route cimport Known

cdef class Place:
    cdef bytes path
    cdef int dir_fd
    cdef bint _is_ours
    cdef Handle _number

cdef bytes path_bytes(path, str name=*)
cdef int check_folder(bytes path, int dir_fd) except -1
cdef int cached_path(int dir_fd, const char *path, int flags) noexcept nogil
cdef int path_fd(int dir_fd, const char *path, int flags) noexcept nogil
cdef int open_leased(int dir_fd, const char *path, int flags, int mode) noexcept nogil
cdef int open_fd_again(int fd, int flags) noexcept
cdef bint is_certain(int error) noexcept
cdef int folder_at_hand() noexcept
cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2
cdef int open_at_hand(bytes path, int dir_fd, int flags, object name, Known known=*) except -2
