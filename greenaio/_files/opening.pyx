# cython: language_level=3, boundscheck=False, wraparound=False
"""Opening a path: inline if it is cached and waits for no disk, otherwise by a walk through threads.

An open may also wait for another process: at a FIFO for its other end, at a file for the end of a lease. No
such wait holds the hub, or a thread that others need.
"""

import os
import sys
from io import FileIO

from gevent import sleep

from libc.errno cimport EAGAIN, EEXIST, ENXIO
from libc.stdint cimport int64_t
from posix.unistd cimport close as close_fd

from greenaio._files import ranges

from greenaio._core.driver cimport Driver
from greenaio._core.fifo cimport meetings, meetings_under_way
from greenaio._core.handle cimport closing
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport chain, make_here, new_call, new_chain
from greenaio._core.request cimport NEW, Request
from greenaio._core.threads cimport Pool
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.changes cimport hold_range, takes_turn
from greenaio._files.paths cimport Place, check_folder, open_at_hand, open_fd_again, path_bytes
from greenaio._files.route cimport Known
from greenaio._files.steps cimport GO_ON, LEASED, open_there, way
from greenaio._files.walk cimport Walk

cdef extern from *:
    """
    #include <fcntl.h>
    #include <poll.h>
    #include <sys/syscall.h>
    #include <unistd.h>

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
    bint has_writer(int fd)
    bint is_met(int fd)
    const long SYS_openat
    const int AT_FDCWD
    const int O_CLOEXEC
    const int O_NOFOLLOW
    const int O_CREAT
    const int O_EXCL
    const int O_TRUNC
    const int O_ACCMODE
    const int O_WRONLY

cdef enum:
    # A result of `_walk` besides an fd and minus the errno, as GO_ON is: the FIFO was opened, but its other
    # end is not open. Open it again.
    LONELY = -5002

# The time between two attempts to open a file that has a lease, in seconds. It grows from the minimum to the
# maximum; then a thread waits in the kernel.
cdef double LEASE_MIN = 0.001
cdef double LEASE_MAX = 0.25


cdef int open_file(object path, int flags, int mode, int dir_fd, object io_mode=None, Known known=None) except -1:
    """Open *path* and return the fd. Raise OSError with the path as file name.

    Audit hooks see *io_mode* as the mode: the mode of `io`, or None from `os`. If *known* is given, a new
    object, it gets the facts of the file if they cost no further calls.

    The open runs inline if the path is cached and waits for no disk. Otherwise the hub and threads walk to
    the file."""
    cdef bytes encoded = path_bytes(path, 'open' if io_mode is None else None)
    cdef Driver driver = current_driver()
    cdef Place place
    cdef Walk walk
    cdef int64_t fd
    flags |= O_CLOEXEC
    sys.audit('open', path, io_mode, flags)
    driver.check_caller()
    if closing:
        check_folder(encoded, dir_fd)
    fd = open_at_hand(encoded, dir_fd, flags, path, known)
    if fd >= 0:
        try:
            driver.end_in_line()
        except BaseException:
            # The greenlet was killed in `end_in_line`, and no code knows the fd.
            close_fd(fd)
            raise
        return fd
    place = Place(encoded, dir_fd)
    fd = LONELY
    while fd == LONELY:
        walk = Walk(place.path, place.dir_fd, not flags & O_NOFOLLOW and flags & (O_CREAT | O_EXCL) != O_CREAT | O_EXCL)
        walk.keep = place
        walk.way.opens, walk.way.flags, walk.way.permissions = True, flags, mode
        walk.way.truncates = flags & O_TRUNC != 0
        fd = walk_there(driver, walk, 'open', open_there)
        if fd == LEASED:
            fd = _wait_for_lease(driver, walk)
    if fd < 0:
        raise failed(fd, path)
    return fd


cdef int64_t walk_there(Driver driver, Walk walk, str name, chain call) except? -4096:
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
                mine = hold_range(-1, known, 0, ranges.EVERYTHING)
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
        fd = walk_there(driver, walk, 'open', open_there)
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
    cdef bytes encoded = path_bytes(path)
    cdef int64_t fd
    flags |= O_CLOEXEC
    sys.audit('open', path, io_mode, flags)
    fd = make_here(new_call(-1, encoded, SYS_openat, AT_FDCWD, <long><char *>encoded, flags, mode))
    if fd < 0:
        raise failed(fd, path)
    return fd
