from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.driver cimport Driver, Way, Ways
from greenaio._core.handle cimport Inode
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool

cdef class Nowait:
    cdef uint64_t _history              # a bit for each of the last answers: whether it was a refusal ...
    cdef uint64_t _unknown              # ... and whether that was EOPNOTSUPP
    cdef uint64_t _pause_until          # ns
    cdef uint64_t _length               # of the next pause, ns

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
    cdef readonly bint is_swapped       # its bytes may be swapped out, to a disk
    cdef readonly bint answers          # its files have no bytes: the kernel makes up what is read
    cdef readonly bint is_local         # nobody is told of what is read or closed
    cdef readonly bint is_guess         # its file system is not known yet
    cdef readonly int limit
    cdef readonly Nowait reads
    cdef readonly Nowait writes

    cdef int has(self, str file_system) except -1
    cdef Pool pool(self)
    cdef Way way(self, Nowait direction) noexcept

cdef Device device_of(uint64_t number, uint64_t mount=*)

cdef enum:              # what `open_there` and `stat_there` say besides an errno; no errno is as large
    GO_ON = -5000       # the next step is for other threads: `Walk.go_on` tells which
    LEASED = -5001      # a process has a lease on the file, and was asked to give it up

cdef struct way:
    int folder          # O_PATH: the directory where the walk is; or AT_FDCWD
    int copy            # the number of `folder` or `end` that is a copy of `dir_fd`, and not O_PATH; or -1
    int link            # O_PATH: the link in it that comes next; or -1
    int end             # O_PATH: where the path leads; or -1
    uint64_t device     # what the next step may have to wait for ...
    uint64_t mount      # ... and the unique number of its mount, or 0
    uint64_t inode      # of the end ...
    unsigned int mode   # ... and its st_mode; 0 where there is none
    int error           # minus the errno with which the walk ended; or 0
    int links           # followed
    bint follows        # the last link, too
    bint jumps          # links lead to files, not to the paths that they name
    bint is_over
    char *room          # memory of ours, in which ...
    char *ahead         # ... the names are that are still to be walked ...
    char *name          # ... and the last one before them
    int dir_fd          # the call: what it gets ...
    const char *path
    int flags
    int permissions
    void *answer        # ... and for stat, where its answer goes
    bint opens
    bint truncates      # a regular file that is at the end
    bint stops_at_end   # the hub wants to know of that before the call
    bint is_local       # no server is asked where the walk is ...
    bint passes_a_server    # ... but one is on the way there
    bint is_alone       # the thread is no disk's
    bint is_patient     # an open waits in the kernel for the process that has a lease on the file

cdef class Walk:
    cdef bytes path
    cdef object keep                # what else `way` points into
    cdef tuple servers              # the numbers of the devices on the way that are not local
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
    IN_LINE_MAX = 262144        # bytes: to copy more out of the page cache takes the hub too long

cdef enum:          # what kind of file
    STORED = 1      # a regular file or block device: fsync by AIO
    DIRECT = 2      # and open with O_DIRECT: reads and writes too
    APPEND = 4      # every write makes it longer
    REGULAR = 8
    UNSURE = 16     # a character device: who knows what it waits for
    WRITABLE = 32
    ANSWER = 64     # of a file system that `answers`: one call for each read or write, for each has its own answer
    AT_ONCE = 128   # such a file that waits for nothing
    EVENTS = 256    # such a file that may wait for an event, which poll tells
    LOCKED = 512    # a block device: a call through its page cache locks it, and a seek waits for that

cdef class Known(Ways):
    cdef int kind                       # STORED | DIRECT | ...
    cdef unsigned int mode              # st_mode
    cdef unsigned int align             # of offsets and lengths under O_DIRECT, in bytes
    cdef unsigned int align_memory
    cdef uint64_t number                # of the inode
    cdef int64_t size                   # in bytes, at its open or when it was asked for
    cdef Inode _inode                   # None until it is needed
    cdef bint is_nameless               # nothing but open fds keeps its bytes, and to free them takes time
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

    /* The time of the last tick, up to 10 ms ago: it costs a tenth of the exact one. */
    static inline uint64_t coarse_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        return now.tv_sec * 1000000000ull + now.tv_nsec;
    }

    /* Whether a read of *fd* waits for nothing, as far as poll tells; or poll fails, and the read will say why. */
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
    """What os makes an int of. Declared as one, an argument would be asked for its ``__int__``: a float would be
    cut off, and ``__index__`` not be known. Py_ssize_t is right, so that is what offsets are declared as."""
    return PyNumber_Index(value)
