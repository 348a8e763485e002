# See fifo.pyx: how a thread that waits in open(2) for the other end of a FIFO is released.
cdef void close_path_fd(int fd) noexcept nogil
cdef int join(int fifo) noexcept
cdef void leave(int both) noexcept
cdef int meetings() noexcept
cdef int meetings_under_way() noexcept
