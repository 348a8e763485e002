from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.driver cimport Driver, Way, Ways
from greenaio._core.handle cimport Inode
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool

cdef class Nowait:
    # One bit for each of the last 64 answers: 1 if it was a refusal.
    cdef uint64_t _history
    # One bit for each of the last 64 answers: 1 if it was EOPNOTSUPP.
    cdef uint64_t _unknown
    cdef uint64_t _pause_until          # CLOCK_MONOTONIC, ns
    cdef uint64_t _length               # the next pause, ns

    cdef bint asks(self) noexcept
    cdef bint is_unsupported(self) noexcept
    cdef void _count(self, bint refused, bint is_unknown) noexcept
    cpdef void answered(self, bint again) noexcept
    cpdef void unsupported(self) noexcept

cdef class Known

cdef class Device:
    cdef readonly object number
    cdef readonly str file_system
    cdef readonly bint in_memory
    # The kernel may swap the bytes of its files out to a disk.
    cdef readonly bint is_swapped
    # Its files have no stored bytes: the kernel makes the answer to each read.
    cdef readonly bint answers
    # No server is told of a read or a close.
    cdef readonly bint is_local
    # The name of its file system is not known yet.
    cdef readonly bint is_guess
    cdef readonly int limit
    cdef readonly Nowait reads
    cdef readonly Nowait writes

    cdef int has(self, str file_system) except -1
    cdef Pool pool(self)
    cdef Way way(self, Nowait direction) noexcept

cdef Device device_of(uint64_t number, uint64_t mount=*)

# The results of `open_there`, `stat_there` and `unlink_there` besides success and minus the errno. No errno
# is as large.
cdef enum:
    # The next step is for other threads; `Walk.go_on` returns their pool.
    GO_ON = -5000
    # A process has a lease on the file, and the kernel has asked it to give the lease up.
    LEASED = -5001

# The state of a walk (see "The way to a path" in route.pyx), and the call that the walk is for. Either the
# hub or one thread uses it, never both: the request hands it over and back.
cdef struct way:
    # The O_PATH fd of the directory where the walk is; or AT_FDCWD, or -1.
    int folder
    # The number of `folder` or `end` if that is a copy of `dir_fd`, and not an O_PATH fd; or -1.
    int copy
    # The O_PATH fd of the link in `folder` that the walk follows next; or -1.
    int link
    # The O_PATH fd of the file that the path leads to; or -1.
    int end
    # The device that the next step may have to wait for, and the unique number of its mount, or 0.
    uint64_t device
    uint64_t mount
    # The inode number and st_mode of the place where the walk is. `mode` is 0 after an error.
    uint64_t inode
    unsigned int mode
    # Minus the errno with which the walk ended; or 0.
    int error
    # The number of links that the walk has followed.
    int links
    # The walk follows the last link, too.
    bint follows
    # Links lead to files, not to the paths that they name.
    bint jumps
    bint is_over
    # Memory of this struct. It holds the names that are still to be walked, and the last one before them.
    char *room
    char *ahead
    char *name
    # The arguments of the call; for a stat, `answer` is the memory for its result.
    int dir_fd
    const char *path
    int flags
    int permissions
    void *answer
    bint opens
    # The call empties the file at the end, if that is a regular file.
    bint truncates
    # The walk goes back to the hub at a regular file, before the call.
    bint stops_at_end
    # No server is asked at the place where the walk is ...
    bint is_local
    # ... but one is on the way there.
    bint passes_a_server
    # The thread belongs to no disk.
    bint is_alone
    # An open waits in the kernel for the process that has a lease on the file.
    bint is_patient

cdef class Walk:
    cdef bytes path
    # Keeps the other objects alive that `way` points into.
    cdef object keep
    # The numbers of the devices on the way that are not local.
    cdef tuple servers
    cdef way *way

    cdef int _begin(self) except -1
    cdef Pool go_on(self)
    cdef Device _device(self)
    cdef Pool _pool_to_end(self, Device device)
    cdef bint is_in_memory(self) except -1
    cdef Known truncated(self)
    cdef int arrive(self) noexcept

cdef long open_there(void *arg) noexcept nogil
cdef long stat_there(void *arg) noexcept nogil
cdef long unlink_there(void *arg) noexcept nogil

cdef enum:
    # In bytes. To copy more than that out of the page cache holds the hub for too long.
    IN_LINE_MAX = 262144

# The bits of `Known.kind`.
cdef enum:
    # A regular file or a block device; fsync goes by native AIO.
    STORED = 1
    # Open with O_DIRECT; reads and writes go by native AIO, too.
    DIRECT = 2
    # Open with O_APPEND; every write makes the file longer.
    APPEND = 4
    REGULAR = 8
    # A character device. Its driver alone knows what a call waits for.
    UNSURE = 16
    WRITABLE = 32
    # A file of a file system that `answers`. Each read or write is one call, because each has its own answer.
    ANSWER = 64
    # Such a file, whose reads wait for nothing.
    AT_ONCE = 128
    # Such a file, whose reads may wait for an event; poll tells whether they would.
    EVENTS = 256
    # A block device. A call through its page cache locks it, and a seek waits for that lock.
    LOCKED = 512

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

    cdef int way(self, Driver driver, Request request) except -1
    cdef int answered(self, Request request, int64_t result) except -1
    cdef bint _falls_short(self, Request request, int64_t result) noexcept
    cdef bint _extends(self, Request request) noexcept
    cdef Inode inode(self)
    cdef int demote(self) except -1

cdef Known know(int fd, name)
cdef Known know_again(int fd, Known known)
cdef bint knows_block_devices() noexcept
cdef bint seek_may_wait(Known known) noexcept
cdef bint in_line(Known known, uint64_t nbytes, int fd=*, int64_t offset=*) except -1
cdef bint swap_is_in_use() noexcept
cdef bint is_swapped_out(Known known, int fd, int64_t offset, uint64_t nbytes) noexcept
cdef int64_t file_size(int fd) noexcept
cdef unsigned int block_size(int fd) noexcept
cdef bint is_certain(int error) noexcept
cdef int open_fd_again(int fd, int flags) noexcept
cdef int folder_at_hand() noexcept
cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2
cdef int open_at_hand(bytes path, int dir_fd, int flags, object name, Known known=*) except -2
cdef extern from *:
    """
    #include <poll.h>
    #include <time.h>

    /* Return the time of the last tick in ns, up to 10 ms ago. It costs a tenth of the exact time. */
    static inline uint64_t coarse_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        return now.tv_sec * 1000000000ull + now.tv_nsec;
    }

    /* Return whether a read of *fd* waits for nothing, as far as poll tells. If poll fails the answer is yes,
       and the read will say why. */
    static inline int is_ready(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        return poll(&one, 1, 0) != 0;
    }
    """
    bint is_ready(int fd)
    uint64_t coarse_ns() nogil

cdef int waited_in_hub(int fd, uint64_t began) except -1
cdef object failed(long code, name)

cdef inline int c_int(value) except? -1:
    """Return *value* as an int, by the same rules as the functions of `os`. Raise TypeError if it is no
    integer.

    An argument that is declared as int is asked for its ``__int__``, so that a float would be cut off and an
    object with ``__index__`` alone refused. Py_ssize_t asks for ``__index__``, so offsets are declared as
    Py_ssize_t."""
    return PyNumber_Index(value)
