from libc.stdint cimport uint64_t

# The results of `open_there`, `stat_there` and `unlink_there` besides success and minus the errno. No errno
# is as large.
cdef enum:
    # The next step is for other threads; `Walk.go_on` returns their pool.
    GO_ON = -5000
    # A process has a lease on the file, and the kernel has asked it to give the lease up.
    LEASED = -5001

# The state of a walk (see walk.pyx), and the call that the walk is for. Either the
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

# How far a walk came.
cdef enum:
    ARRIVED
    STOPPED
    CROSSED

cdef void let_go(way *this) noexcept nogil
cdef void free_way(way *this) noexcept nogil
cdef bint note_place(way *this, int fd) noexcept nogil
cdef int arrive(way *this, int error) noexcept nogil
cdef int walk_on(way *this, bint may_wait) noexcept nogil
cdef bint waits_for_a_peer(way *this) noexcept nogil
cdef long open_there(void *arg) noexcept nogil
cdef long stat_there(void *arg) noexcept nogil
cdef long unlink_there(void *arg) noexcept nogil
