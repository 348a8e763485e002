# cython: language_level=3, boundscheck=False, wraparound=False
"""The system calls on files that are neither a read nor a write, each by a thread of its device.

Any of these calls may wait for a disk, because a path is not cached, a journal is full or a close has pages
to write. Only calls on files that have no disk run inline.
"""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import sys
from io import FileIO

from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent

cimport cython
from cpython.number cimport PyIndex_Check
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EBADF, EEXIST, EINTR, EIO, ENXIO, errno as c_errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport close as close_fd, lseek as seek

from gevent import sleep

from greenaio._core import caller as _caller
from greenaio._files import arguments as _arguments, loop as _loop, sectors as alignment
from greenaio._core.ends import was_thrown
from greenaio._core.handle import using
from greenaio._core.uninterrupted import is_uninterrupted

from greenaio._core.driver cimport Driver
from greenaio._core.fifo cimport close_path_fd, meetings, meetings_under_way
from greenaio._core.handle cimport Handle, Inode, check_open, closing, handle_of, take
from greenaio._core.hub cimport current_driver
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._core.request cimport NEW, Request
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.device cimport Device
from greenaio._files.facts cimport LOCKED, REGULAR, STORED, WRITABLE, block_size, file_size
from greenaio._files.paths cimport folder_at_hand, open_at_hand, open_fd_again, path_at_hand
from greenaio._files.route cimport Known, in_line, know, know_again, seek_may_wait
from greenaio._files.steps cimport GO_ON, LEASED, open_there, stat_there, unlink_there, way
from greenaio._files.walk cimport Walk
from greenaio._core.job cimport POSIX_FALLOCATE, chain, make_here, new_call, new_chain, new_close
from greenaio._core.pools cimport pool_of
from greenaio._core.threads cimport Pool

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <sys/epoll.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The beginning of io.FileIO's object, in CPython since 3.0. */
    struct raw_file { PyObject_HEAD int fd; };

    struct closing_file { int fd, stand_in; };

    /* Close the file of a number in a thread, and put the stand-in there. First close another fd of the same
       file, because close(2) tells of the error of a server and dup3(2) does not. If no number is free for
       that fd, the error is lost. */
    static long replace_file(void *arg)
    {
        struct closing_file *one = arg;
        int copy = fcntl(one->fd, F_DUPFD_CLOEXEC, 0);
        long result = 0;
        if (copy >= 0 && close(copy) < 0 && errno != EINTR)
            result = -errno;
        if (dup3(one->stand_in, one->fd, O_CLOEXEC) < 0)
            result = -errno;
        return result;
    }

    /* Return whether the FIFO *fd* has a writer, or has had one since *fd* was opened. Take no data out. If
       no number is free for the question, return 0, so that the caller asks again later. */
    static inline int has_writer(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        int ends[2], has;
        if (poll(&one, 1, 0) == 1)
            return 1;
        if (pipe2(ends, O_CLOEXEC) < 0)
            return 0;
        /* tee fails with EAGAIN if there is a writer that has written nothing, and returns 0 if there is
           none. */
        has = tee(fd, ends[1], 1, SPLICE_F_NONBLOCK) != 0;
        close(ends[0]);
        close(ends[1]);
        return has;
    }

    /* Return whether the other end of a FIFO is open, or bytes were left to read. */
    static inline int is_met(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        return poll(&one, 1, 0) < 1 || one.revents & POLLIN || !(one.revents & (POLLHUP | POLLERR));
    }
    """
    long replace_file(void *arg) noexcept nogil
    bint has_writer(int fd)
    bint is_met(int fd)
    struct raw_file:
        int fd
    struct closing_file:
        int fd
        int stand_in
    int epoll_create1(int flags)
    long syscall(long number, ...) nogil
    const long SYS_gettid
    const long SYS_statx
    const long SYS_preadv2
    const long SYS_pwritev2
    const long SYS_openat
    const long SYS_ftruncate
    const long SYS_fallocate
    const long SYS_copy_file_range
    const long SYS_sendfile
    const long SYS_newfstatat
    const long SYS_lseek
    const long SYS_ioctl
    const long SYS_readahead
    const long SYS_sync_file_range
    const int SYNC_FILE_RANGE_WRITE
    const int SEEK_CUR
    const int SEEK_END
    const int SEEK_DATA
    const int SEEK_HOLE
    const int AT_EMPTY_PATH
    const int AT_SYMLINK_NOFOLLOW
    const int O_CLOEXEC
    const int O_NOFOLLOW
    const int O_PATH
    const int O_CREAT
    const int O_EXCL
    const int O_TRUNC
    const int O_ACCMODE
    const int O_WRONLY
    struct timespec:
        long tv_sec
        long tv_nsec
    struct c_stat "stat":
        uint64_t st_dev
        uint64_t st_ino
        unsigned int st_mode
        uint64_t st_nlink
        unsigned int st_uid
        unsigned int st_gid
        uint64_t st_rdev
        int64_t st_size
        long st_blksize
        int64_t st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim


cdef enum:
    # A result of `_walk` besides an fd and minus the errno, as GO_ON is: the FIFO was opened, but its other
    # end is not open. Open it again.
    LONELY = -5002

# The time between two attempts to open a file that has a lease, in seconds. It grows from the minimum to the
# maximum; then a thread waits in the kernel.
LEASE_MIN = 0.001
LEASE_MAX = 0.25


cdef enum:
    PAGE = 4096                 # bytes


cdef int64_t _call(int fd, Device device, keep, long number, long a=0, long b=0, long c=0,
                   long d=0) except? -4096:
    """Have a thread of *device* make a system call. Return its result, or minus the errno. The request keeps
    *keep* alive, also after the greenlet was killed."""
    return current_driver().perform_by_thread(new_call(fd, keep, number, a, b, c, d), device.pool())


cdef Pool _pool_between(Known source, Known target):
    """Return the threads for a call that reads from *source* and writes to *target*. Either may hang, so a
    pair of devices has threads of its own, which hold up no call that uses only one of the two."""
    if not target.kind & STORED or target.device.number == source.device.number or target.device.in_memory:
        return source.device.pool()
    if source.device.in_memory:
        return target.device.pool()
    return pool_of((source.device.number, target.device.number))


cdef Known _open_file(int fd):
    """Return the facts of *fd*. Raise EBADF if it is not open, also if the program has closed it and
    operations that are under way still keep its number."""
    check_open(fd)
    return know(fd, None)


# Paths -------------------------------------------------------------------------------------------

cdef bytes _encoded(path, str name=None):
    """Return *path* as bytes. Raise ValueError if it has a null byte; from Python 3.13 on the message has
    *name*, the function of `os`. *name* is None for `io`."""
    cdef bytes encoded
    found = os.fsencode(path)
    # An object of a subclass of bytes is copied, because it may have other methods.
    encoded = found if type(found) is bytes else bytes(memoryview(found))
    if b'\0' in encoded:
        raise ValueError('embedded null byte' if name is None or sys.version_info < (3, 13)
                         else f'{name}: embedded null character in path')
    return encoded


@cython.final
@cython.no_gc_clear
cdef class _Place:
    """The place where a thread begins to look up *path*, perhaps after the working directory has changed.

    A relative path begins in the directory that is the working directory now. `dir_fd` is an O_PATH fd of
    that directory, which stays open as long as this object lives. If the caller gave the fd of another
    directory, this object keeps its number taken. The request keeps the object, so both hold if the greenlet
    is killed.

    If no fd is free, or to open the directory would wait for a server, the path is made absolute instead.
    That makes a difference only if the directory is renamed before the look-up.
    """

    cdef bytes path
    cdef int dir_fd
    cdef bint _is_ours
    cdef Handle _number

    def __cinit__(self, bytes path, int dir_fd):
        # This path means the thread that asks, so name that thread: another one makes the call.
        if path.startswith(b'/proc/thread-self/'):
            path = b'/proc/self/task/%d/%s' % (syscall(SYS_gettid), path[len(b'/proc/thread-self/'):])
        self.path, self.dir_fd = path, dir_fd
        if path.startswith(b'/'):
            return
        if dir_fd >= 0:
            _check_folder(path, dir_fd)
            self._number = take(dir_fd)
        if dir_fd != AT_FDCWD:
            return
        cdef int fd = folder_at_hand()
        if fd >= 0:
            self.dir_fd, self._is_ours = fd, True
        elif path:
            try:
                self.path = os.path.join(posix.getcwdb(), path)
            except OSError:
                # No path leads to the directory, so the look-up will fail with the true error.
                pass

    def __dealloc__(self):
        if self._is_ours:
            close_path_fd(self.dir_fd)
        if self._number is not None:
            self._number.let_go()


def working_directory():
    """Return a new O_PATH fd of the working directory. Audit hooks don't see it, because the program opens
    nothing. Raise OSError if a server would have to be asked whether the directory may be searched."""
    cdef int fd = folder_at_hand()
    if fd < 0:
        raise failed(fd, None)
    return fd


cdef int _check_folder(bytes path, int dir_fd) except -1:
    """Raise EBADF if *path* begins in a directory whose number is being closed."""
    if dir_fd >= 0 and not path.startswith(b'/'):
        check_open(dir_fd)
    return 0


cdef int open_file(object path, int flags, int mode, int dir_fd, object io_mode=None, Known known=None) except -1:
    """Open *path* and return the fd. Raise OSError with the path as file name.

    Audit hooks see *io_mode* as the mode: the mode of `io`, or None from `os`. If *known* is given, a new
    object, it gets the facts of the file if they cost no further calls.

    The open runs inline if the path is cached and waits for no disk. Otherwise the hub and threads walk to
    the file."""
    cdef bytes encoded = _encoded(path, 'open' if io_mode is None else None)
    cdef Driver driver = current_driver()
    cdef _Place place
    cdef Walk walk
    cdef int64_t fd
    flags |= O_CLOEXEC
    sys.audit('open', path, io_mode, flags)
    driver.check_caller()
    if closing:
        _check_folder(encoded, dir_fd)
    fd = open_at_hand(encoded, dir_fd, flags, path, known)
    if fd >= 0:
        try:
            driver.end_in_line()
        except BaseException:
            # The greenlet was killed in `end_in_line`, and no code knows the fd.
            close_fd(fd)
            raise
        return fd
    place = _Place(encoded, dir_fd)
    fd = LONELY
    while fd == LONELY:
        walk = Walk(place.path, place.dir_fd, not flags & O_NOFOLLOW and flags & (O_CREAT | O_EXCL) != O_CREAT | O_EXCL)
        walk.keep = place
        walk.way.opens, walk.way.flags, walk.way.permissions = True, flags, mode
        walk.way.truncates = flags & O_TRUNC != 0
        fd = _walk(driver, walk, 'open', open_there)
        if fd == LEASED:
            fd = _wait_for_lease(driver, walk)
    if fd < 0:
        raise failed(fd, path)
    return fd


cdef int64_t _walk(Driver driver, Walk walk, str name, chain call) except? -4096:
    """Walk on and return the result of *call* at the end of *walk*. Each part of the way waits in threads of
    its own device.

    A call that empties a file first holds the range of the whole file, so the walk comes back to the hub
    before the call."""
    cdef Request request
    cdef Pool pool
    cdef Known known
    cdef int64_t result = GO_ON
    cdef bint is_fifo
    cdef int met
    while result == GO_ON:
        pool = walk.go_on()
        # The call has to take its turn with the writes of the file that it empties.
        walk.way.stops_at_end = walk.way.truncates
        known, mine = walk.truncated(), None
        try:
            # To empty a file frees its blocks.
            request = new_chain(-1, walk, name, call, walk.way, not walk.way.truncates)
            if known is not None and takes_turn(known, request):
                walk.arrive()
                mine = hold_range(-1, known, 0, alignment.EVERYTHING)
                request.count_in(mine.writes, mine)
            request.gives_fd = walk.way.opens
            request.fifo = walk.arrive()
            is_fifo, met = request.fifo >= 0, meetings() - meetings_under_way()
            result = driver.perform_by_thread(request, pool)
            if request.state == NEW:
                result = _open_without_thread(request, walk.way)
        finally:
            if mine is not None:
                mine.let_go()
        if is_fifo and result >= 0 and meetings() != met and not _has_peer(<int>result):
            result = LONELY
    return result


cdef int64_t _open_without_thread(Request request, way *this) except? -4096:
    """Open a file whose open may wait for ever, when no thread can be started. The hub may not wait in such
    an open.

    A FIFO is opened with O_NONBLOCK, again and again until its other end is open. For a file that has a lease
    the result is LEASED, and the caller tries again. A device that may wait is opened in the hub even so.
    Return the fd, or minus the errno."""
    cdef int fifo = request.fifo
    cdef int64_t fd = -ENXIO
    cdef double delay = LEASE_MIN
    if fifo < 0:
        return LEASED if this.is_patient else make_here(request)
    if this.flags & O_CREAT and this.flags & O_EXCL:
        return -EEXIST
    try:
        while True:
            # The kernel says ENXIO to a writer while no process has the FIFO open for reading.
            if fd == -ENXIO:
                fd = open_fd_again(fifo, this.flags & ~(O_CREAT | O_NOFOLLOW))
            if fd < 0 and fd != -ENXIO:
                return fd
            if fd >= 0 and (this.flags & O_ACCMODE == O_WRONLY or has_writer(<int>fd)):
                break
            sleep(delay)
            delay = min(1.5 * delay, LEASE_MAX)
    except BaseException:
        if fd >= 0:
            close_fd(<int>fd)
        raise
    finally:
        request.fifo = -1
        close_fd(fifo)
    return fd


cdef bint _has_peer(int fd) except -1:
    """Return whether the other end of the FIFO *fd* is open; if not, close *fd*.

    The open may have met no peer but `Request.meet`, which opens the other end to free the thread of a killed
    greenlet: another greenlet that waited for the same FIFO was killed during the open."""
    cdef bint has = False
    cdef double delay = LEASE_MIN
    try:
        # A meeting ends when its thread has returned.
        while meetings_under_way() and delay < LEASE_MAX:
            sleep(delay)
            delay *= 1.5
        has = is_met(fd)
    finally:
        if not has:
            close_fd(fd)
    return has


cdef int64_t _wait_for_lease(Driver driver, Walk walk) except? -4096:
    """Open the file again until the process that has a lease on it has given it up.

    The first attempt has told that process, which usually answers at once. Only an open that waits in the
    kernel hears of the answer, and nothing calls its thread back if the greenlet is killed. The thread stays
    there until the kernel takes the lease away, after ``/proc/sys/fs/lease-break-time``. So the greenlet
    first tries for most of a second, and then has a thread wait that belongs to no disk. That thread also
    gets the true answer of a file system that says EAGAIN for another reason. Return the fd, or minus the
    errno."""
    cdef int64_t fd = LEASED
    cdef double delay = LEASE_MIN
    while fd == LEASED:
        sleep(delay)
        delay = min(1.5 * delay, 2 * LEASE_MAX)
        walk.way.is_patient = delay > LEASE_MAX
        fd = _walk(driver, walk, 'open', open_there)
        if fd == LEASED and walk.way.is_patient and not _is_lease_breaking():
            # The open has EAGAIN for another reason than a lease, and no thread could be started for the true
            # answer.
            return -EAGAIN
    return fd


cdef bint _is_lease_breaking() except -1:
    """Return whether any process is asked to give up a lease; also if the kernel does not tell."""
    try:
        with FileIO('/proc/locks') as locks:
            return any(b' LEASE ' in line and b' BREAKING ' in line for line in locks.readall().splitlines())
    except OSError:
        # There is no /proc.
        return True


def open(path, flags, mode=0o777, *, dir_fd=None, io_mode=None):
    """Open *path* as `os.open` does. Return the fd. Raise OSError. Audit hooks see *io_mode* as the mode."""
    return open_file(os.fspath(path), c_int(flags), c_int(mode), AT_FDCWD if dir_fd is None else c_int(dir_fd),
                     io_mode)


def open_here(path, int flags, int mode, *, io_mode=None):
    """Open *path* as `open` does, but block the calling thread. Return the fd. Raise OSError."""
    cdef bytes encoded = _encoded(path)
    cdef int64_t fd
    flags |= O_CLOEXEC
    sys.audit('open', path, io_mode, flags)
    fd = make_here(new_call(-1, encoded, SYS_openat, AT_FDCWD, <long><char *>encoded, flags, mode))
    if fd < 0:
        raise failed(fd, path)
    return fd


def stat(path, *, dir_fd=None, follow_symlinks=True):
    """Return the stat of *path*, or of an fd, as `os.stat` does: inline if the kernel's cache tells all,
    otherwise by threads of the devices on the way. Raise OSError."""
    cdef bytes encoded
    cdef int flags = 0 if follow_symlinks else AT_SYMLINK_NOFOLLOW
    if PyIndex_Check(path):
        if dir_fd is not None:
            raise ValueError("stat: can't specify dir_fd without matching path")
        if not follow_symlinks:
            raise ValueError('stat: cannot use fd and follow_symlinks together')
        if c_int(path) < 0:
            # `posix.stat` has an error of its own for a negative number.
            return posix.stat(path)
        try:
            return fstat(path)
        except OSError as error:
            if not was_thrown(error):
                error.filename = path
            raise
    path = os.fspath(path)
    encoded = _encoded(path, 'stat')
    cdef int where = AT_FDCWD if dir_fd is None else c_int(dir_fd)
    current_driver().check_caller()
    if closing:
        _check_folder(encoded, where)
    cdef int fd = path_at_hand(encoded, where, 0 if follow_symlinks else O_NOFOLLOW, path)
    if fd >= 0:
        try:
            found = posix.fstat(fd)
        finally:
            close_fd(fd)
        current_driver().end_in_line()
        return found
    cdef _Place place = _Place(encoded, where)
    cdef Walk walk = Walk(place.path, place.dir_fd, follow_symlinks)
    cdef AlignedBuffer memory
    walk.go_on()
    if walk.is_in_memory():
        if walk.way.error:
            raise failed(walk.way.error, path)
        return posix.fstat(walk.way.end)
    memory = scratch(sizeof(c_stat))
    walk.way.flags, walk.way.answer = flags, memory.address
    walk.keep = place, memory
    cdef int64_t result = _walk(current_driver(), walk, 'stat', stat_there)
    if result < 0:
        raise failed(result, path)
    return _stat_result(<c_stat *>memory.address)


def unlink(path):
    """Remove *path* as `os.unlink` does. Raise OSError."""
    cdef bytes encoded = _encoded(os.fspath(path), 'unlink')
    cdef _Place place
    cdef Walk walk
    cdef int64_t result
    sys.audit('os.remove', path, -1)
    current_driver().check_caller()
    place = _Place(encoded, AT_FDCWD)
    walk = Walk(place.path, place.dir_fd, False)
    walk.keep = place
    result = _walk(current_driver(), walk, 'unlink', unlink_there)
    if result < 0:
        raise failed(result, path)


def fstat(fd):
    """Return the stat of the open *fd*, as `os.fstat` does: inline unless a server has to be asked. Raise
    OSError."""
    cdef int number = c_int(fd)
    cdef Known known = _open_file(number)
    if in_line(known, 0) or known.device.is_local:
        return posix.fstat(number)
    cdef AlignedBuffer memory = scratch(sizeof(c_stat))
    cdef int64_t result = _call(number, known.device, memory, SYS_newfstatat, number, <long><char *>b'',
                                <long>memory.address, AT_EMPTY_PATH)
    if result < 0:
        raise failed(result, None)
    return _stat_result(<c_stat *>memory.address)


cdef object _stat_result(c_stat *st):
    """Return the `os.stat_result` for the answer of the kernel, with the fields that `os.stat` gives on
    Linux."""
    atime, mtime, ctime = _ns(st.st_atim), _ns(st.st_mtim), _ns(st.st_ctim)
    return os.stat_result(
        (st.st_mode, st.st_ino, st.st_dev, st.st_nlink, st.st_uid, st.st_gid, st.st_size,
         st.st_atim.tv_sec, st.st_mtim.tv_sec, st.st_ctim.tv_sec),
        {'st_atime': _seconds(st.st_atim), 'st_mtime': _seconds(st.st_mtim),
         'st_ctime': _seconds(st.st_ctim), 'st_atime_ns': atime, 'st_mtime_ns': mtime,
         'st_ctime_ns': ctime, 'st_blksize': st.st_blksize, 'st_blocks': st.st_blocks,
         'st_rdev': st.st_rdev})


cdef object _ns(timespec when):
    """Return the time in nanoseconds, as an int of any size."""
    return <object>when.tv_sec * 1000000000 + when.tv_nsec


cdef double _seconds(timespec when) noexcept:
    return <double>when.tv_sec + 1e-9 * when.tv_nsec


def initialize(object raw, int fd, str mode, bint is_shared=False):
    """Do the work of ``FileIO.__init__(raw, fd, mode, False)`` without a wait in the hub.

    `io.FileIO` asks for the size and moves to the end. A server may not answer that, and a block device may
    be locked. So it first gets another file, which has a position if *fd* has one, and afterwards the number
    *fd*."""
    cdef raw_file *memory
    cdef bint appends = 'a' in mode
    cdef bint has_position = not appends or _open_file(fd).kind & LOCKED != 0
    # The kernel answers this without the server.
    if not has_position:
        has_position = _loop.has_position(fd, _loop.WRITE) if is_shared else seek(fd, 0, SEEK_CUR) >= 0
    others = (posix.open(os.devnull, os.O_RDONLY | O_CLOEXEC),) if has_position else posix.pipe2(O_CLOEXEC)
    try:
        FileIO.__init__(raw, others[0], mode, False)
        memory = <raw_file *><PyObject *>raw
        if memory.fd != others[0]:
            # The object has another layout than `raw_file`, so its own `__init__` has to do.
            FileIO.__init__(raw, fd, mode, False)
            return
        memory.fd = fd
    finally:
        for other in others:
            posix.close(other)
    # The buffers above *raw* take this as their size.
    if hasattr(raw, '_blksize'):
        try:
            raw._blksize = block_size(fd)
        except AttributeError:
            # The attribute is read-only since Python 3.14.
            pass
    if appends and has_position:
        lseek(fd, 0, SEEK_END, is_shared)


def lseek(int fd, int64_t offset, int whence, bint is_shared=False):
    """Move the file's own position. Return the new one, in bytes. Raise OSError.

    The call runs inline if it needs no data that may have to be fetched, and no read can hold the lock of the
    position. If the position *is_shared*, a read of another process or thread may hold the lock."""
    cdef Known known = _open_file(fd)
    cdef int64_t result
    if (whence > SEEK_END or whence == SEEK_END and not known.device.is_local or seek_may_wait(known)
            or is_shared and known.kind & STORED and not known.device.in_memory):
        result = _call(fd, known.device, None, SYS_lseek, fd, offset, whence)
        if result < 0:
            raise failed(result, None)
        return result
    return os.lseek(fd, offset, whence)


cdef struct extent:
    int64_t nbytes
    int64_t is_data


# The arguments of `_find_extents`, and its result: up to `room` extents in `found`.
cdef struct survey:
    int fd
    int64_t offset
    int64_t end
    int room
    extent *found


cdef int64_t _next_border(int fd, int64_t offset, int64_t end, int whence) noexcept nogil:
    """Return the offset where the next data or the next hole begins, at most *end*; or minus the errno. The
    result is kept between *offset* and *end*, because a server may give any answer."""
    cdef int64_t found = seek(fd, offset, whence) if offset < end else end
    if found < 0:
        # ENXIO means that no data follows.
        return end if c_errno == ENXIO else -c_errno
    return min(max(found, offset), end)


cdef long _find_extents(void *arg) noexcept nogil:
    """List the extents from `survey.offset` on, in a thread. Return their number; or minus the errno, if an
    error comes before the first one. The number of seeks is bounded, because a server may answer with the
    same offset for ever."""
    cdef survey this = (<survey *>arg)[0]
    cdef int64_t offset = this.offset
    cdef int64_t border
    cdef int n = 0
    cdef int steps = 0
    cdef bint is_data = False
    while offset < this.end and n < this.room and steps < 2 * this.room:
        border = _next_border(this.fd, offset, this.end, SEEK_HOLE if is_data else SEEK_DATA)
        if border < 0:
            return n if n else border
        if border > offset:
            this.found[n].nbytes, this.found[n].is_data = border - offset, is_data
            n += 1
        offset = border
        is_data = not is_data
        steps += 1
    return n if n or offset >= this.end else -EIO


def extents(int fd, int64_t offset, int64_t end):
    """Return a list of pairs: the length of an extent in bytes, and whether it has data. A hole reads as
    zeros. The list goes from *offset* to *end*, or less far if there are many extents. The call moves the
    file's own position. Raise OSError."""
    cdef int room = _arguments.EXTENTS_MAX
    cdef AlignedBuffer memory = scratch(sizeof(survey) + room * sizeof(extent))
    cdef survey *this = <survey *>memory.address
    cdef Device device = _open_file(fd).device
    this.fd, this.offset, this.end, this.room = fd, offset, end, room
    this.found = <extent *>(memory.address + sizeof(survey))
    cdef int64_t n = current_driver().perform_by_thread(
        new_chain(fd, memory, 'lseek', _find_extents, this, False), device.pool())
    if n < 0:
        raise failed(n, None)
    return [(this.found[i].nbytes, this.found[i].is_data != 0) for i in range(n)]


def ioctl(int fd, unsigned long number, bytes argument):
    """Make the call ``ioctl(fd, number, argument)``. Return the bytes of *argument* as the call has left
    them. Raise OSError."""
    cdef AlignedBuffer memory = scratch(len(argument))
    memcpy(memory.address, <char *>argument, len(argument))
    cdef int64_t result = _call(fd, _open_file(fd).device, memory, SYS_ioctl, fd, number, <long>memory.address)
    if result < 0:
        raise failed(result, None)
    return memory.address[:memory.nbytes]


# The umask of the process, which threads are told of.
learn_umask, umask = _caller.learn_umask, _caller.umask


def errors_of_newer_calls():
    """Return a dict from the name of each newer system call that has a substitute here to its errno. The
    calls are made with arguments that no kernel accepts, so the errno is EBADF, EFAULT or EINVAL unless the
    call is denied or unknown."""
    return {name: c_errno if syscall(number, -1, NULL, NULL, NULL, NULL, NULL) < 0 else 0 for name, number in (
        ('statx', SYS_statx), ('preadv2', SYS_preadv2), ('pwritev2', SYS_pwritev2), ('openat2', 437),
        ('copy_file_range', SYS_copy_file_range), ('cachestat', 451), ('statmount', 457))}


# Ranges that greenlets hold, see `sectors` -------------------------------------------------------

cdef (uint64_t, uint64_t) in_pages(uint64_t start, uint64_t end) noexcept:
    """Return the range that a buffered write changes, in bytes. The page cache reads and writes back whole
    pages."""
    return start & ~<uint64_t>(PAGE - 1), (end + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef bint takes_turn(Known known, Request request) except -1:
    """Return whether *request*, which changes the file, has to hold a range of it, because greenlets hold
    ranges. If not, the request counts in the writes of the inode from now on.

    No other thread runs between the look at the ranges and the count. The greenlet that asks for the first
    range of the file looks at the writes afterwards, so it sees this request."""
    if known._inode is None:
        known.inode()
    if known._inode.ranges is not None:
        return True
    # In memory no write has to be one of whole sectors, so none waits for this request.
    if not known.device.in_memory:
        request.count_in(known._inode.writes, known._inode)
    return False


cdef object hold_range(int fd, Known known, start, end):
    """Wait for the range, and return it held. The number *fd* stays the same file until then."""
    return alignment.hold(fd, known.inode(), start, end)


cdef object shield_in(mine, int fd, work):
    """Return the `Shielded` of ``work()``, which runs in the range that *mine* holds and gives the range back
    at its end. If the work can't begin because memory is short, give the range back at once and raise."""
    try:
        return alignment.Shielded(fd, work, mine)
    except BaseException:
        mine.let_go()
        raise


cdef object work_in(mine, int fd, work):
    """Wait for the end of ``work()`` in the range of *mine*, and return its result. See `shield_in`."""
    return shield_in(mine, fd, work).get()


def settle(int fd):
    """Wait until no write to the file *fd* is under way in this process, not even one of a killed greenlet.
    Then the file ends where it seems to end. Until the caller waits again, no other greenlet of this thread
    writes there."""
    cdef Known known = know(fd, None)
    cdef Inode inode = known.inode()
    if inode.ranges is not None or inode.writes.count:
        hold_range(fd, known, 0, alignment.EVERYTHING).let_go()


def _change(int fd, Known known, int64_t start, Request request, Pool pool=None):
    """Make the call *request*, which changes the file *fd* from *start* on. Return its result, or minus the
    errno. The call holds the file from *start* on if greenlets hold ranges of it."""
    current_driver().check_caller()
    request.file = known
    if not takes_turn(known, request):
        return _perform(request, known, pool)

    def work():
        try:
            request.count_in(mine.writes, mine)
            return _perform(request, known, pool)
        finally:
            request.end_write_unless_under_way()

    mine = hold_range(fd, known, max(0, start), alignment.EVERYTHING)
    return work_in(mine, fd, work)


cdef int64_t _perform(Request request, Known known, Pool pool) except? -4096:
    """Have a thread make the call. Return its result, or minus the errno. *pool* is None for the threads of
    the device."""
    return current_driver().perform_by_thread(request, known.device.pool() if pool is None else pool)


cdef int64_t _change_in(mine, Request request, Known known) except? -4096:
    """Make a call that changes the file, in the range that *mine* holds. Return its result, or minus the
    errno."""
    request.file = known
    request.count_in(mine.writes, mine)
    return _perform(request, known, None)


# Descriptors -------------------------------------------------------------------------------------

def ftruncate(fd, Py_ssize_t length, *, bint is_told=False):
    """Set the size of the file *fd* to *length* bytes. Raise OSError. With *is_told* audit hooks see the
    call: they see `os.ftruncate`, but no truncation by a file object."""
    cdef int number = c_int(fd)
    cdef Known known
    cdef int64_t result
    if is_told:
        sys.audit('os.truncate', number, length)
    known = _open_file(number)
    # The call frees the memory of the bytes that it cuts off, and a large amount takes time.
    if in_line(known, max(0, file_size(number) - length)):
        result = make_here(new_call(number, None, SYS_ftruncate, number, length))
    else:
        result = _change(number, known, length, new_call(number, None, SYS_ftruncate, number, length))
    if result < 0:
        raise failed(result, None)


cdef int64_t truncate_file(int fd, Known known, int64_t length, mine) except? -4096:
    """Set the size of the file to *length* bytes, in the range that *mine* holds. Return 0, or minus the
    errno."""
    return _change_in(mine, new_call(fd, None, SYS_ftruncate, fd, length), known)


def posix_fallocate(fd, Py_ssize_t offset, Py_ssize_t length):
    """Allocate *length* bytes at *offset* of the file *fd*, as `os.posix_fallocate` does. Raise OSError."""
    cdef int number = c_int(fd)
    cdef Known known = _open_file(number)
    cdef int64_t result
    result = _change(number, known, offset, new_call(number, None, POSIX_FALLOCATE, number, offset, length))
    if result < 0:
        raise failed(result, None)


cdef int64_t fallocate_file(int fd, Known known, int mode, int64_t offset, int64_t length, mine) except? -4096:
    """Make the call fallocate(2), in the range that *mine* holds. Return 0, or minus the errno."""
    return _change_in(mine, new_call(fd, None, SYS_fallocate, fd, mode, offset, length), known)


def copy_file_range(src, dst, Py_ssize_t count, offset_src=None, offset_dst=None):
    """Copy up to *count* bytes from the file *src* to the file *dst*, as `os.copy_file_range` does. Return
    the number of bytes copied. Raise OSError. An offset of None is the file's own position."""
    cdef int source = c_int(src), target = c_int(dst)
    cdef Known known
    cdef AlignedBuffer memory = scratch(16)
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory.address
    cdef int64_t result
    if count < 0:
        raise ValueError('negative value for \'count\' not allowed')
    offsets[0] = 0 if offset_src is None else offset_src
    offsets[1] = 0 if offset_dst is None else offset_dst
    known = _open_file(source)
    cdef Known other = _open_file(target)
    # The numbers stay taken, also during the wait for a range of the target.
    with using(source), using(target):
        result = _copy(target, other, offsets[1], new_call(
            source, memory, SYS_copy_file_range, source, 0 if offset_src is None else <long>&offsets[0],
            target, 0 if offset_dst is None else <long>&offsets[1], count), source, known)
    if result < 0:
        raise failed(result, None)
    return result


cdef int64_t _copy(int target, Known other, int64_t start, Request request, int source, Known known) except? -4096:
    """Make the call *request*, which copies from *source* to *target*, from *start* on. Return its result, or
    minus the errno."""
    cdef Pool pool = _pool_between(known, other)
    if other.kind & STORED:
        request.fd, request.other_fd = target, source
        return _change(target, other, start, request, pool)
    request.other_fd = target
    return current_driver().perform_by_thread(request, pool)


def readahead(int fd, int64_t offset, Py_ssize_t count):
    """Have the page cache read *count* bytes at *offset* ahead. An error is ignored, because a read will tell
    it."""
    _call(fd, _open_file(fd).device, None, SYS_readahead, fd, offset, count)


def start_writing(int fd, int64_t offset, int64_t nbytes):
    """Have the page cache begin to write the dirty pages of the range. An error is ignored, because fsync
    will tell it."""
    _call(fd, _open_file(fd).device, None, SYS_sync_file_range, fd, offset, nbytes, SYNC_FILE_RANGE_WRITE)


def sendfile(out_fd, in_fd, offset, Py_ssize_t count):
    """Send up to *count* bytes of the file *in_fd*, from *offset* on, to *out_fd*, as `os.sendfile` does.
    Return the number of bytes sent. Raise OSError. An *offset* of None is the file's own position."""
    cdef int target = c_int(out_fd), source = c_int(in_fd)
    cdef Known known, other
    cdef AlignedBuffer memory = scratch(8)
    cdef Py_ssize_t *at = <Py_ssize_t *>memory.address
    cdef int64_t result
    at[0] = 0 if offset is None else offset
    known = _open_file(source)
    other = _open_file(target)
    # The numbers stay taken, also during the wait for the socket.
    with using(source), using(target):
        while True:
            result = _copy(target, other, 0, new_call(
                source, memory, SYS_sendfile, target, source, 0 if offset is None else <long>at, count),
                source, known)
            if result != -EAGAIN:
                break
            # The target is a non-blocking socket that is full. The sockets of gevent are non-blocking.
            _loop.wait_for(target, _loop.WRITE)
    if result < 0:
        raise failed(result, None)
    return result


def close(fd, *, bint may_wait=True, bint is_forgotten=False):
    """Close *fd*. See `close_file` for the arguments. Raise OSError."""
    close_file(c_int(fd), may_wait, is_forgotten)


# Closing -----------------------------------------------------------------------------------------
#
# A close may have to write data, tell a server, or free the blocks of a file without a name. So a thread
# makes it. Until the close is done the number must not come to mean another file, because the greenlet that
# asked for the close may be killed, and close the number again. But close(2) frees the number before it
# begins to wait. So the thread puts a stand-in at the number by dup3(2), which closes the file as close(2)
# does and keeps the number taken. The hub closes the stand-in when the thread is done, and forgets the
# `Handle` in the same moment. Until then the handle answers EBADF to every call.

@cython.final
cdef class _SlowClose:
    """The close of one number by a thread, after the last use of the number."""

    cdef closing_file _file
    cdef Pool _pool

    def __call__(self, Handle handle):
        """Begin the close, and wait for nothing. The last user of *handle* calls this."""
        cdef Driver driver = None
        cdef Request request = None
        try:
            if get_hub_if_exists() is not None:
                driver = current_driver()
                request = self._request(handle)
        except (MemoryError, OSError, RuntimeError):
            # No number or memory is free for the stand-in, or the interpreter ends.
            pass
        finally:
            if request is None:
                # There is no request, so close the number in this thread.
                handle.close_number()
        if request is not None:
            driver.let_run(request, self._pool)

    cdef int64_t wait(self, Handle handle) except? -4096:
        """Make the close and wait for it. Return 0, or minus the errno. The only user of *handle* calls
        this."""
        cdef Driver driver
        cdef Request request = None
        handle.close_with(_close_number)
        try:
            # The hub may be newer than the file, and this its first wait, so this may raise.
            driver = current_driver()
            request = self._request(handle)
        except (MemoryError, OSError, RuntimeError):
            pass
        finally:
            # Without a request, the handle has no other user and this closes the number in this thread.
            handle.let_go()
        return 0 if request is None else driver.perform_by_thread(request, self._pool)

    cdef Request _request(self, Handle handle):
        """Return the request for the close, which becomes a user of *handle*. Raise OSError if no number is
        free."""
        cdef Request request
        self._file.fd = handle.fd
        # The stand-in is an epoll instance, because a read or write of one fails.
        self._file.stand_in = epoll_create1(O_CLOEXEC)
        if self._file.stand_in < 0:
            raise failed(-c_errno, None)
        # The handle closes the stand-in at its own end.
        handle.stand_in = self._file.stand_in
        request = new_close(self, replace_file, &self._file)
        request.handle = handle.again()
        handle.close_with(_close_number)
        return request


def _close_number(Handle handle):
    handle.close_number()


cdef bint _close_waits(Known known) except -1:
    """Return whether the close of the file, which has a name, may write data or ask a server."""
    return not in_line(known, 0) and (known.kind & WRITABLE or not known.device.is_local
                                      # The last close of a block device writes the pages that others left
                                      # dirty.
                                      or known.kind & (STORED | REGULAR) == STORED)


cdef Pool _pool_to_close(int fd, bint also_writers, Known known):
    """Return the threads that close the file *fd*, or None if its close waits for nothing. Without
    *also_writers*, the answer is also None for a file that is open for writing and has a name."""
    try:
        known = know_again(fd, known)
        if known.is_nameless or (also_writers or not known.kind & WRITABLE) and _close_waits(known):
            return known.device.pool()
    except OSError as error:
        if error.errno == EBADF:
            raise
        # Any other error, such as one of an xfs that was shut down, leaves a close that has nothing to wait
        # for.
    except MemoryError:
        pass
    return None


cdef int close_file(int fd, bint may_wait, bint is_forgotten=False, Known known=None) except -1:
    """Close *fd*. *known* has the facts of the file that the caller knows, or is None. Raise OSError: EBADF
    if the fd is being closed already, otherwise the error of the close.

    If operations need the number, they go on, and the last of them closes it. Otherwise a thread closes the
    fd if the close may wait. This greenlet waits for the thread if it can and *may_wait* is set; the hub
    can't, and makes the plain call.

    A finalizer closes an fd that *is_forgotten*, which means that no code knows its number any more. So a
    thread that frees a file without a name, or tells a server of the end of a reader, may close the fd later,
    and the finalizer waits for nothing. A forgotten writer is closed at once, because the file can't be
    executed before that."""
    cdef _SlowClose slow = None
    cdef Handle handle
    cdef Pool pool = None
    cdef int64_t result = 0
    check_open(fd)
    _loop.lose(fd)
    hub = get_hub_if_exists()
    may_wait = may_wait and hub is not None and getcurrent() is not hub and not is_uninterrupted()
    handle = handle_of(fd)
    if handle is not None or may_wait or is_forgotten and not sys.is_finalizing():
        pool = _pool_to_close(fd, handle is not None or may_wait, known)
    if pool is not None:
        slow = _new_slow_close(pool)
    # From here on no other thread runs until the close has begun. The answers above may be out of date, so
    # ask for the handle again.
    handle = handle_of(fd)
    if handle is not None or slow is not None:
        handle = _take_to_close(fd)
    if handle is None:
        result = -c_errno if close_fd(fd) < 0 else 0
    elif handle.closing:
        handle.let_go()
        result = -EBADF
    elif handle.users == 1 and slow is not None and may_wait:
        result = slow.wait(handle)
    else:
        handle.close_with(_close_number if slow is None else slow)
        handle.let_go()
    if result < 0 and result != -EINTR:
        raise failed(result, None)
    return 0


cdef _SlowClose _new_slow_close(Pool pool):
    """Return a `_SlowClose` for threads of *pool*; None if there is no memory for it."""
    cdef _SlowClose slow
    try:
        slow = _SlowClose.__new__(_SlowClose)
    except MemoryError:
        return None
    slow._pool = pool
    return slow


cdef Handle _take_to_close(int fd):
    """Take *fd* and return its handle; None if there is no memory for it."""
    try:
        return take(fd)
    except MemoryError:
        return None
