from libc.stdint cimport int64_t, uint64_t

from greenaio._core.dispatch cimport Dispatcher, Ways
from greenaio._core.driver cimport Driver
from greenaio._core.handle cimport Inode
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool
from greenaio._files.device cimport Device
from greenaio._files.facts cimport facts

cdef enum:
    # In bytes. To copy more than that out of the page cache holds the hub for too long.
    IN_LINE_MAX = 262144

cdef class Known(Ways):
    cdef int kind                       # STORED | DIRECT | ...
    cdef unsigned int mode              # st_mode
    # The alignment that O_DIRECT wants of offsets and lengths, and of memory, in bytes.
    cdef unsigned int align
    cdef unsigned int align_memory
    # The number of the inode, or BLOCK_DEVICE.
    cdef uint64_t number
    # In bytes, at the time of the open or of the last question.
    cdef int64_t size
    cdef Inode _inode                   # None until needed
    # Only open fds keep the bytes of the file, and freeing them takes time.
    cdef bint is_nameless
    cdef Device device

    cdef int way(self, Dispatcher driver, Request request) except -1
    cdef int answered(self, Request request, int64_t result) except -1
    cdef bint _falls_short(self, Request request, int64_t result) noexcept
    cdef bint _extends(self, Request request) noexcept
    cdef Inode inode(self)
    cdef int demote(self) except -1

cdef Known know(int fd, name)
cdef Known know_open(int fd)
cdef Known know_again(int fd, Known known)
cdef int learn(Known known, int fd, facts *found, int flags) except -1
cdef bint knows_block_devices() noexcept
cdef bint seek_may_wait(Known known) noexcept
cdef bint in_line(Known known, uint64_t nbytes, int fd=*, int64_t offset=*) except -1
cdef bint swap_is_in_use() noexcept
cdef bint is_swapped_out(Known known, int fd, int64_t offset, uint64_t nbytes) noexcept
cdef int64_t perform(Request request, Known known, Pool pool=*) except? -4096
cdef int64_t by_thread(Driver driver, Request request, Known known) except? -4096
