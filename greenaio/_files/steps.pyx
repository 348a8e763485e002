# cython: language_level=3
"""The steps of a walk along a path: the hub makes them without a wait, and a thread of a device with one.

Without the GIL, so no Python object is used here. `Walk` says in which threads the steps wait.
"""

from libc.errno cimport EAGAIN, ELOOP, ENOMEM, ENOTDIR, errno as c_errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen
from posix.stat cimport S_ISCHR, S_ISDIR, S_ISFIFO, S_ISLNK, S_ISREG
from posix.unistd cimport close as close_fd

from greenaio._core.caller cimport creation_mode
from greenaio._core.fifo cimport close_path_fd
from greenaio._files.facts cimport facts, facts_of
from greenaio._files.paths cimport cached_path, open_leased, path_fd

cdef extern from "<fcntl.h>":
    const int O_CLOEXEC
    const int O_NOFOLLOW
    const int O_PATH
    const int O_CREAT
    const int O_TMPFILE
    const int O_ACCMODE
    const int O_RDWR
    const int O_DIRECTORY
    const int O_NONBLOCK
    const int AT_EMPTY_PATH
    const int AT_FDCWD
    int openat(int dir_fd, const char *path, int flags, ...) nogil

cdef extern from "<limits.h>":
    const int PATH_MAX

cdef extern from "<sys/stat.h>":
    struct c_stat "stat":
        pass
    int fstatat(int dir_fd, const char *path, c_stat *found, int flags) nogil

cdef extern from "<unistd.h>":
    long readlinkat(int dir_fd, const char *path, char *text, size_t room) nogil
    int unlinkat(int dir_fd, const char *path, int flags) nogil

cdef enum:
    # Links on one walk, as many as the kernel's MAXSYMLINKS.
    LINKS_MAX = 40


cdef void let_go(way *this) noexcept nogil:
    """Close all fds of the walk, because a call that waits needs no fds besides its own."""
    _close_place(this, this.folder)
    _close_place(this, this.link)
    _close_place(this, this.end)
    this.folder = this.link = this.end = this.copy = -1


cdef void _close_place(way *this, int fd) noexcept nogil:
    """Close one fd of the walk, or nothing if it is negative."""
    if fd < 0:
        return
    if fd == this.copy:
        close_fd(fd)
    else:
        close_path_fd(fd)


cdef void free_way(way *this) noexcept nogil:
    let_go(this)
    free(this.room)
    free(this)


cdef bint note_place(way *this, int fd) noexcept nogil:
    """Write down the device, mount, inode and mode of *fd*. Return whether the device is another than
    before."""
    cdef facts found
    cdef bint is_other
    if facts_of(fd, b'', &found):
        return False
    is_other = found.device != this.device
    this.device, this.mount, this.inode, this.mode = found.device, found.mount, found.inode, found.mode
    return is_other


cdef int arrive(way *this, int error) noexcept nogil:
    """End the walk with *error*, minus the errno, or 0. Return ARRIVED."""
    this.is_over = True
    if error:
        this.error = error
        this.mode = 0
    return ARRIVED


cdef int _look_up(way *this, bint may_wait) noexcept nogil:
    """Look up the next name, and go past it. Return an O_PATH fd of it, without following a link, or minus
    the errno."""
    cdef int fd = -ENOTDIR
    cdef char *end = this.ahead
    cdef char kept
    this.name = end
    while end[0] != 0 and end[0] != b'/':
        end += 1
    kept, end[0] = end[0], 0
    # If more names follow, look the name up as a directory, because that triggers an automount.
    if kept:
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW | O_DIRECTORY)
    if fd == -ENOTDIR:
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW)
    end[0] = kept
    if fd >= 0:
        this.ahead = end
    return fd


cdef int _follow(way *this) noexcept nogil:
    """Read the link, and put its text in front of the names that are still to be walked. Return 0, or minus
    the errno."""
    cdef long n, more = strlen(this.ahead)
    cdef char *text = <char *>malloc(PATH_MAX + more + 2)
    if text == NULL:
        return -ENOMEM
    n = readlinkat(this.link, b'', text, PATH_MAX)
    this.links += 1
    if n <= 0 or this.links > LINKS_MAX:
        free(text)
        return -ELOOP
    # `ahead` is empty, or begins with a slash.
    memcpy(text + n, this.ahead, more + 1)
    free(this.room)
    this.room = this.ahead = text
    return 0


cdef int _jump(way *this) noexcept nogil:
    """Have the kernel follow the link to the file itself, because its text may be no path. Return an O_PATH
    fd, or minus the errno."""
    cdef char kept = this.ahead[0]
    this.ahead[0] = 0
    cdef int fd = path_fd(this.folder, this.name, 0)
    this.ahead[0] = kept
    return fd


cdef void _enter(way *this, int fd) noexcept nogil:
    """Take *fd*, the place that was looked up last, as the link to follow, the end or the next directory."""
    if S_ISLNK(this.mode) and (this.ahead[0] or this.follows):
        this.link = fd
    elif this.ahead[0] == 0:
        this.end = fd
        arrive(this, 0)
    elif not S_ISDIR(this.mode):
        close_fd(fd)
        arrive(this, -ENOTDIR)
    else:
        while this.ahead[0] == b'/':
            this.ahead += 1
        _close_place(this, this.folder)
        if this.folder == this.copy:
            this.copy = -1
        this.folder = fd


cdef int walk_on(way *this, bint may_wait) noexcept nogil:
    """Walk on. Return ARRIVED at the end, or STOPPED if the next step would have to wait for `way.device`, or
    CROSSED as soon as the walk is on another device, where it may be at its end, too."""
    cdef int fd
    cdef bint is_other
    while True:
        if this.link >= 0:
            if not may_wait:
                return STOPPED
            fd = _jump(this) if this.jumps else _follow(this)
            close_fd(this.link)
            this.link = -1
            if fd < 0:
                return arrive(this, fd)
            if not this.jumps:
                continue
        elif this.ahead[0] == b'/':
            while this.ahead[0] == b'/':
                this.ahead += 1
            # The root directory is in memory, so this does not wait.
            fd = path_fd(AT_FDCWD, b'/', 0)
            if fd < 0:
                return arrive(this, fd)
        elif this.ahead[0] == 0:
            this.end, this.folder = this.folder, -1
            return arrive(this, 0)
        else:
            fd = _look_up(this, may_wait)
            if fd == -EAGAIN and not may_wait:
                return STOPPED
            if fd < 0:
                return arrive(this, fd)
        is_other = note_place(this, fd)
        _enter(this, fd)
        if is_other and not this.error:
            return CROSSED
        if this.is_over:
            return ARRIVED


cdef bint _has_to_go_on(way *this) noexcept nogil:
    """Walk on in a thread. Return whether other threads have to make the call."""
    return not this.is_over and (walk_on(this, True) == CROSSED or this.passes_a_server
                                 or this.stops_at_end and S_ISREG(this.mode))


cdef bint waits_for_a_peer(way *this) noexcept nogil:
    """Return whether the open waits for the other end of a FIFO, or for a character device to be ready."""
    if not this.opens or this.flags & O_PATH:
        return False
    if S_ISFIFO(this.mode):
        return not this.flags & O_NONBLOCK and this.flags & O_ACCMODE != O_RDWR
    return S_ISCHR(this.mode)


cdef long open_there(void *arg) noexcept nogil:
    """Walk on in a thread, then open. Return the fd, or minus the errno. Return GO_ON if other threads have
    to make the call, and LEASED if a process has to give up its lease first."""
    cdef way *this = <way *>arg
    cdef int fd
    cdef int mode
    if _has_to_go_on(this):
        return GO_ON
    if waits_for_a_peer(this) and not this.is_alone:
        return GO_ON
    let_go(this)
    mode = this.permissions
    if this.flags & (O_CREAT | O_TMPFILE):
        # An open that waits for its peer creates a file only if the FIFO was removed since the walk.
        mode = creation_mode(mode, not waits_for_a_peer(this))
    if S_ISREG(this.mode) and this.is_local and not this.flags & (O_NONBLOCK | O_PATH) and not this.is_patient:
        fd = open_leased(this.dir_fd, this.path, this.flags, mode)
        return LEASED if fd == -EAGAIN else fd
    fd = openat(this.dir_fd, this.path, this.flags | O_CLOEXEC, mode)
    return fd if fd >= 0 else -c_errno


cdef long stat_there(void *arg) noexcept nogil:
    """Walk on in a thread, then stat. Return 0, minus the errno, or GO_ON as `open_there` does."""
    cdef way *this = <way *>arg
    cdef int error
    if _has_to_go_on(this):
        return GO_ON
    # The walk has followed no link, so the kernel has checked each step as in a look-up of the whole path.
    if this.end >= 0 and this.links == 0:
        error = 0 if fstatat(this.end, b'', <c_stat *>this.answer, AT_EMPTY_PATH) == 0 else c_errno
        # Close the fds in this thread: the close of the last fd of a file without a name frees its blocks.
        let_go(this)
        return -error
    let_go(this)
    return 0 if fstatat(this.dir_fd, this.path, <c_stat *>this.answer, this.flags) == 0 else -c_errno


cdef long unlink_there(void *arg) noexcept nogil:
    """Walk on in a thread, then unlink. Return 0, minus the errno, or GO_ON as `open_there` does."""
    cdef way *this = <way *>arg
    if _has_to_go_on(this):
        return GO_ON
    let_go(this)
    return 0 if unlinkat(this.dir_fd, this.path, 0) == 0 else -c_errno
