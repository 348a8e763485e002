cdef bint forked() noexcept nogil
