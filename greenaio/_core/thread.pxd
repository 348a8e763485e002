cdef int start_thread(void *(*run)(void *) noexcept nogil, void *arg) noexcept
cdef void close_elsewhere(int fd) noexcept
