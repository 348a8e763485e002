"""Reads and writes of files that are not stored, such as pipes and terminals, which wait in the loop."""

from __future__ import annotations

# `socket` may be the module of gevent.
import _socket
import errno
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import stat
from collections.abc import Callable, Sequence
from typing import Any

from gevent.monkey import get_original

from greenaio._core.handle import using
from greenaio._files.extension import _file
from greenaio._files.loop import READ, WRITE, wait_for

# gevent removes `epoll` from `select` when it patches that.
epoll = get_original('select', 'epoll')

# The major device number of /dev/null, /dev/kmsg and /dev/random, and the minor numbers of /dev/null,
# /dev/zero, /dev/full and /dev/urandom.
MEMORY = 1
NEVER_WAIT = (3, 5, 7, 9)
# With this offset preadv2 and pwritev2 read and write as read(2) and write(2) do.
NO_POSITION = -1
# In bytes. A pipe that poll calls writable takes so many bytes without a wait.
PIPE_BUF = 4096
# In bytes: the greatest size that an ordinary user may give to a pipe.
PIPE_MAX = 1 << 20
# Errors that say nothing of the pipe: RWF_NOWAIT is not known for FIFOs with a name and for pipes before
# Linux 6.5, and some sandboxes deny the call.
CANNOT_ASK = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def read_stream(fd: int, mode: int, n: int) -> bytes:
    """Read up to *n* bytes from a file that is not stored, such as a pipe, when the loop says that it is
    ready."""
    with using(fd):
        while n > 0:
            if not _wait(fd, mode, READ):
                return _read_without_position(fd, n)
            if not _is_blocking_pipe(fd, mode):
                break
            buffer = bytearray(min(n, PIPE_MAX))
            got = _now(posix.preadv, posix.readv, fd, [buffer])
            if got is not None:
                return bytes(memoryview(buffer)[:got])
        return posix.read(fd, n)


def readv_stream(fd: int, mode: int, buffers: Sequence[Any]) -> int:
    """Read into *buffers* from a file that is not stored, when the loop says that it is ready. Return bytes
    read."""
    with using(fd):
        while nbytes_of(buffers) > 0:
            if not _wait(fd, mode, READ):
                return _file.preadv(fd, buffers, NO_POSITION)
            if not _is_blocking_pipe(fd, mode):
                break
            got = _now(posix.preadv, posix.readv, fd, buffers)
            if got is not None:
                return got
        return posix.readv(fd, buffers)


def writev_stream(fd: int, mode: int, buffers: Sequence[Any]) -> int:
    """Write *buffers* to a file that is not stored, as `os.writev` does. Return bytes written."""
    with using(fd):
        if _is_blocking_pipe(fd, mode) or _is_blocking_terminal(fd, mode):
            return write_all(fd, mode, memoryview(b''.join(buffers)))
        if nbytes_of(buffers) > 0 and not _wait(fd, mode, WRITE):
            return _file.pwritev(fd, buffers, NO_POSITION)
        return posix.writev(fd, buffers)


def write_all(fd: int, mode: int, data: memoryview) -> int:
    """Write *data* as a blocking write does, in pieces that a ready pipe takes without a wait. Return bytes
    written; after an error the bytes before it, if any. A terminal is ready as soon as it has room for one
    byte, so a thread writes to it."""
    written = 0
    while True:
        if len(data) and (not _wait(fd, mode, WRITE) or _is_blocking_terminal(fd, mode)):
            return _file.pwritev(fd, [data], NO_POSITION)
        is_last = (len(data) - written <= PIPE_BUF or not os.get_blocking(fd)
                   or _answers_at_once(fd, mode, WRITE) or keeps_messages(fd, mode))
        piece = data[written:] if is_last else data[written:written + PIPE_BUF]
        try:
            n = (_now(posix.pwritev, posix.writev, fd, [piece]) if _is_blocking_pipe(fd, mode)
                 else posix.write(fd, piece))
        except OSError:
            if written:
                return written
            raise
        if n is not None:
            written += n
            if is_last:
                return written


def _wait(fd: int, mode: int, event: int) -> bool:
    """Wait until the loop says that *fd* is ready. Return False if the loop can't tell, so that the call
    needs a thread.

    The caller is `using` the number. Otherwise it could be closed and used again during the wait, and the
    bytes would go to another file.
    """
    if _answers_at_once(fd, mode, event) or not os.get_blocking(fd):
        return True
    # Make an empty call, which raises if the fd can't be read or written. The loop would wait for that for
    # ever.
    (posix.readv if event == READ else posix.writev)(fd, [])
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        if not _is_pollable(fd):
            return False
        # Of devices only terminals are sure to tell when they can be written: /dev/kmsg never says so.
        if event == WRITE and stat.S_ISCHR(mode) and not os.isatty(fd):
            return False
    wait_for(fd, event)
    return True


def _answers_at_once(fd: int, mode: int, event: int) -> bool:
    """Return whether the call waits for nothing: on a directory, which is an error, or on a device without
    hardware, such as /dev/null."""
    if not stat.S_ISCHR(mode):
        return stat.S_ISDIR(mode)
    device = posix.fstat(fd).st_rdev
    return os.major(device) == MEMORY and (event == WRITE or os.minor(device) in NEVER_WAIT)


def _is_pollable(fd: int) -> bool:
    """Return whether epoll accepts *fd*. If epoll refuses an fd, libev takes it for ready and libuv
    raises."""
    try:
        with epoll(1) as one:
            one.register(fd, 0)
    except OSError:
        return False
    return True


def _is_blocking_pipe(fd: int, mode: int) -> bool:
    return stat.S_ISFIFO(mode) and os.get_blocking(fd)


def _is_blocking_terminal(fd: int, mode: int) -> bool:
    return stat.S_ISCHR(mode) and os.isatty(fd) and os.get_blocking(fd)


def keeps_messages(fd: int, mode: int) -> bool:
    """Return whether each write to *fd* is a message, which may not come in pieces, because *fd* is a socket
    that is no stream."""
    if not stat.S_ISSOCK(mode):
        return False
    one = _socket.socket(fileno=fd)
    try:
        return one.type != _socket.SOCK_STREAM
    finally:
        one.detach()


def _now(call: Callable[..., int], plain: Callable[..., int], fd: int, buffers: Sequence[Any]) -> int | None:
    """Read into *buffers* or write them, after the loop said that the pipe *fd* is ready. Return bytes moved,
    or None if the pipe is not ready any more.

    Another process may have been quicker. For example, workers that log to one pipe are all told of its room,
    and one of them fills it."""
    try:
        return call(fd, buffers, NO_POSITION, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return None
        if error.errno not in CANNOT_ASK:
            raise
    return plain(fd, buffers)


def _read_without_position(fd: int, n: int) -> bytes:
    buffer = bytearray(n)
    return bytes(memoryview(buffer)[:_file.preadv(fd, [buffer], NO_POSITION)])


def nbytes_of(buffers: Sequence[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)
