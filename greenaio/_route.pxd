from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint64_t

from greenaio._threads cimport Pool

cdef enum Way:
    ASK         # native AIO with RWF_NOWAIT: what would wait comes back as EAGAIN
    PLAIN       # native AIO: it does not wait here, or there is no way to ask
    THREAD

cdef class Nowait:
    cdef bint _unknown
    cdef uint64_t _history
    cdef uint64_t _pause_until

    cdef bint asks(self) noexcept
    cpdef void answered(self, bint again) noexcept

cdef class Device:
    cdef readonly object number
    cdef readonly str file_system
    cdef readonly bint in_memory
    cdef readonly bint answers          # its files have no bytes: the kernel makes up what is read
    cdef readonly bint is_local         # nobody is told of what is read or closed
    cdef readonly int limit
    cdef readonly Nowait reads
    cdef readonly Nowait writes

    cdef Pool pool(self)
    cdef Way way(self, Nowait direction) noexcept

cdef Device device_of(uint64_t number)

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

cdef class Known:
    cdef int kind                       # STORED | DIRECT | ...
    cdef unsigned int mode              # st_mode
    cdef unsigned int align             # of offsets and lengths under O_DIRECT, in bytes
    cdef unsigned int align_memory
    cdef uint64_t inode
    cdef bint is_nameless               # nothing but open fds keeps its bytes, and to free them takes time
    cdef Device device

    cdef bint is_demoted(self) except -1

cdef Known know(int fd, name)
cdef bint in_line(Known known, uint64_t nbytes) except -1
cdef int64_t file_size(int fd) noexcept
cdef Device device_of_path(bytes path, int dir_fd)
cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2
cdef int open_at_hand(bytes path, int dir_fd, int flags, object name) except -2
cdef extern from *:
    """
    #include <poll.h>

    /* Whether a read of *fd* waits for nothing, as far as poll tells; or poll fails, and the read will say why. */
    static inline int is_ready(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        return poll(&one, 1, 0) != 0;
    }
    """
    bint is_ready(int fd)

cdef object failed(long code, name)

cdef inline int c_int(value) except? -1:
    """What os makes an int of. Declared as one, an argument would be asked for its ``__int__``: a float would be
    cut off, and ``__index__`` not be known. Py_ssize_t is right, so that is what offsets are declared as."""
    return PyNumber_Index(value)
