# The C types of _core/handle.py, for its compiled form.

cimport cython
from libc.stdint cimport uint64_t

# As C variables these cost no look-up in the dictionary of the module.
cdef int closing
cdef list _handles

cdef uint64_t BLOCK_DEVICE
cdef dict _inodes

# The classes can't be subclassed, so their methods are called without a look-up.
@cython.final
cdef class Writes:
    cdef readonly int count
    cdef object owner
    cdef public object at_end

    cpdef begin(self, owner)
    cpdef end(self)

@cython.final
cdef class Inode:
    cdef object __weakref__
    cdef readonly tuple key
    cdef public uint64_t demoted_until
    cdef public object ranges
    cdef readonly Writes writes
    cdef object _entry

@cython.locals(fresh=Inode)
cpdef Inode inode_of(device, number)
cpdef Inode inode_if_any(device, number)

@cython.final
cdef class Handle:
    cdef readonly int fd
    cdef readonly int users
    cdef readonly bint closing
    cdef public int stand_in
    cdef object _close

    cpdef Handle again(self)
    cpdef let_go(self)
    # `noexcept`, because the engine calls it while its lists are not right, and could not raise there.
    cpdef bint let_go_unless_last(self) noexcept
    cpdef close_with(self, close)
    cpdef close_number(self)
    cpdef _close_numbers(self)
    cpdef bint is_idle(self) noexcept

cdef bint _forget(Handle handle) except -1
@cython.locals(handle=Handle)
cpdef Handle handle_of(int fd)
@cython.locals(handle=Handle)
cpdef Handle take(int fd)
@cython.locals(handle=Handle, fresh=Handle)
cdef Handle _add(int fd)
cdef int _refuse() except -1
@cython.locals(handle=Handle)
cpdef bint is_closing(int fd) except -1
cpdef check_open(int fd)
@cython.locals(handle=Handle, inode=Inode)
cpdef _after_fork_in_child()
