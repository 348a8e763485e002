cdef enum:
    # Our own numbers begin here. A program that closes a number twice closes a low one, which is in use
    # again.
    OWN_MIN = 500

cdef class Eventfd:
    # Minus the errno that `eventfd` gave, if a pipe stands for it. Otherwise 0.
    cdef readonly long denied
    # The number for the loop, which watches it.
    cdef readonly int eventfd
    # Another number of the same eventfd, which the kernel and our own calls use.
    cdef readonly int own_eventfd
    # The name by which the kernel knows the eventfd, see `name_of`.
    cdef long name

    cpdef int signal(self) except -1
    cpdef int clear(self) except -1
    cdef void renew(self) noexcept
    cdef long _make(self) noexcept
    cdef bint _may_take(self, int number) noexcept
    cdef int _renewed(self, int number, int fresh) noexcept
    cdef void _close_numbers(self) noexcept

cdef os_error(long code, what)
cdef void signal_eventfd(int fd, int same, long name) noexcept nogil
