# cython: language_level=3, boundscheck=False, wraparound=False
"""Closing a number: it means no other file until its close is done.

A close may have to write data, tell a server, or free the blocks of a file without a name. So a thread
makes it. Until the close is done the number must not come to mean another file, because the greenlet that
asked for the close may be killed, and close the number again. But close(2) frees the number before it
begins to wait. So the thread puts a stand-in at the number by dup3(2), which closes the file as close(2)
does and keeps the number taken. The hub closes the stand-in when the thread is done, and forgets the
`Handle` in the same moment. Until then the handle answers EBADF to every call.
"""

import sys

from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent

cimport cython
from libc.errno cimport EBADF, EINTR, errno as c_errno
from libc.stdint cimport int64_t
from posix.unistd cimport close as close_fd

from greenaio._core.uninterrupted import is_uninterrupted
from greenaio._files import loop as _loop

from greenaio._core.driver cimport Driver
from greenaio._core.handle cimport Handle, check_open, handle_of, take
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport new_close
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.facts cimport REGULAR, STORED, WRITABLE
from greenaio._files.route cimport Known, in_line, know_again

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/epoll.h>
    #include <unistd.h>

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
    """
    long replace_file(void *arg) noexcept nogil
    struct closing_file:
        int fd
        int stand_in
    int epoll_create1(int flags)
    const int O_CLOEXEC


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


def close(fd, *, bint may_wait=True, bint is_forgotten=False):
    """Close *fd*. See `close_file` for the arguments. Raise OSError."""
    close_file(c_int(fd), may_wait, is_forgotten)


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
    result = _close(fd, slow, may_wait)
    if result < 0 and result != -EINTR:
        raise failed(result, None)
    return 0


cdef int64_t _close(int fd, _SlowClose slow, bint may_wait) except? -4096:
    """Close *fd*, or have the last user of its number close it: by a thread if *slow* is not None. Return 0,
    or minus the errno.

    No other thread runs until the close has begun. The caller's answers may be out of date, so ask for the
    handle again."""
    cdef Handle handle = handle_of(fd)
    if handle is not None or slow is not None:
        handle = _take_to_close(fd)
    if handle is None:
        return -c_errno if close_fd(fd) < 0 else 0
    if handle.closing:
        handle.let_go()
        return -EBADF
    if handle.users == 1 and slow is not None and may_wait:
        return slow.wait(handle)
    handle.close_with(_close_number if slow is None else slow)
    handle.let_go()
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
