"""`read` and `write` at the kernel's own file position, which stays in the kernel.

Others look there: gunicorn and ``sendfile`` ask ``lseek(fd, 0, SEEK_CUR)``. But a thread inside read(2) holds
the position, and the hub's lseek would wait for it. So what takes a thread is a positional request between
two lseeks, and greenlets that use one fd take turns. What epoll accepts waits for the loop, as gevent does.
"""

from __future__ import annotations

import _socket  # not socket, which may be gevent's
import contextlib
import errno
import fcntl
import os
import posix  # not os: these are called as they are, whatever was patched
import stat
from collections.abc import Callable, Sequence
from typing import Any

from gevent.monkey import get_original

from greenaio import alignment
from greenaio._fallback import flat, wait_for
from greenaio._handle import using
from greenaio._turn import turn_of

try:
    from greenaio import _calls, _file
except ImportError:
    from greenaio import _fallback as _calls  # type: ignore[no-redef]
    from greenaio import _fallback as _file  # type: ignore[no-redef]

epoll = get_original('select', 'epoll')     # gevent takes it away

READ, WRITE = 1, 2              # what both loops call them
MEMORY = 1                      # the device number's major part of /dev/null, /dev/kmsg, /dev/random ...
NEVER_WAIT = (3, 5, 7, 9)       # ... and the minor one of /dev/null, zero, full and urandom
NO_POSITION = -1                # to preadv2 and pwritev2: read and write as read(2) and write(2) do
PIPE_BUF = 4096                 # bytes: a pipe that poll says is writable takes as much without waiting
PIPE_MAX = 1 << 20              # bytes: to how much an ordinary user may set the size of a pipe
# Of RWF_NOWAIT: FIFOs that have a name and pipes before Linux 6.5; sandboxes that deny the call.
CANNOT_ASK = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def blocking(call: Callable[..., Any], *args: Any, place: int = 0, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, one of `posix`, for a greenlet inside `uninterrupted`. The argument
    at *place* is the fd of the file that it reads or changes.

    Parked greenlets may be in the middle of a read or write at the file's position, or of its sectors. Raises
    BlockingSwitchOutError if they are.
    """
    fd = args[place]
    facts = posix.fstat(fd)
    if not is_stored(facts.st_mode):
        return call(*args, **kwargs)
    name = call.__name__
    with turn_of(fd) if name in ('read', 'readv', 'write', 'writev') else contextlib.nullcontext():
        if name not in ('read', 'readv'):
            start, end = 0, alignment.EVERYTHING
            if name in ('pwrite', 'pwritev'):
                try:
                    start, end = args[2], args[2] + _nbytes([args[1]] if name == 'pwrite' else args[1])
                except (TypeError, IndexError):
                    return call(*args, **kwargs)    # it tells what is wrong with them
            alignment.refuse_if_held((facts.st_dev, facts.st_ino), start, end)
        return call(*args, **kwargs)


def _wait(fd: int, mode: int, event: int) -> bool:
    """Wait for the loop to say that *fd* is ready. Return False where it can't tell: the call needs a thread.

    For who is `using` it: a number closed and reused meanwhile would get bytes that are meant for another.
    """
    if _answers_at_once(fd, mode, event) or not os.get_blocking(fd):
        return True
    (posix.readv if event == READ else posix.writev)(fd, [])    # else it waits for ever for what can't be
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        if not is_pollable(fd):
            return False
        # Of devices only terminals are sure to tell when they can be written: /dev/kmsg never says so.
        if event == WRITE and stat.S_ISCHR(mode) and not os.isatty(fd):
            return False
    wait_for(fd, event)
    return True


def _answers_at_once(fd: int, mode: int, event: int) -> bool:
    """Whether it is a directory, which is an error, or a device without hardware, such as /dev/null."""
    if not stat.S_ISCHR(mode):
        return stat.S_ISDIR(mode)
    device = posix.fstat(fd).st_rdev
    return os.major(device) == MEMORY and (event == WRITE or os.minor(device) in NEVER_WAIT)


def is_pollable(fd: int) -> bool:
    """Whether epoll accepts *fd*. libev takes an fd that it refuses for ready, libuv raises."""
    try:
        with epoll(1) as one:
            one.register(fd, 0)
    except OSError:
        return False
    return True


def _at_position(fd: int, mode: int, event: int, call: Callable[[int], int]) -> int:
    """Make a request at the kernel's position a positional one, and move that position on. A file
    without a position, such as some of FUSE and tracefs, gets the call without one, and needs no turn."""
    # The seek of a block device waits for its other readers.
    lseek = _calls.lseek if stat.S_ISBLK(mode) else os.lseek
    with using(fd):
        with turn_of(fd):
            at = _position_of(fd, lseek)
            if at != NO_POSITION:
                if event == WRITE and not _writes_at_position(fd):
                    return call(NO_POSITION)
                moved = call(at)
                if moved and event == WRITE and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                    at = _calls.facts(fd)[1] - moved    # the kernel wrote at the end
                lseek(fd, at + moved, os.SEEK_SET)
                return moved
        return call(NO_POSITION)


def _position_of(fd: int, lseek: Callable[[int, int, int], int]) -> int:
    try:
        return lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == errno.ESPIPE:
            return NO_POSITION
        raise


def _writes_at_position(fd: int) -> bool:
    """Whether pwrite works where lseek does: not on a seq_file of the kernel's, such as /proc/self/comm."""
    if _calls.facts(fd)[2]:
        try:
            posix.pwritev(fd, [], 0)    # no byte: it asks whether it may, and calls nothing
        except OSError as error:
            return error.errno != errno.ESPIPE
    return True


def read(fd: int, n: int) -> bytes:
    mode = _calls.facts(fd)[0]
    data = b''

    def reading(at: int) -> int:
        nonlocal data
        data = _file.pread(fd, n, at) if at != NO_POSITION or n < 0 else _read_without_position(fd, n)
        return len(data)

    if is_stored(mode):
        _at_position(fd, mode, READ, reading)
        return data
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


def _is_blocking_pipe(fd: int, mode: int) -> bool:
    return stat.S_ISFIFO(mode) and os.get_blocking(fd)


def _now(call: Callable[..., int], plain: Callable[..., int], fd: int, buffers: Sequence[Any]) -> int | None:
    """Read into, or write, *buffers*, as the loop says that the pipe *fd* is ready. None if it is no
    longer, because another process was quicker: workers that log to one pipe are all told of its room, and
    one of them fills it."""
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


def readv(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]
    if is_stored(mode):
        return _at_position(fd, mode, READ, lambda at: _file.preadv(fd, buffers, at))
    with using(fd):
        while _nbytes(buffers) > 0:
            if not _wait(fd, mode, READ):
                return _file.preadv(fd, buffers, NO_POSITION)
            if not _is_blocking_pipe(fd, mode):
                break
            got = _now(posix.preadv, posix.readv, fd, buffers)
            if got is not None:
                return got
        return posix.readv(fd, buffers)


def write(fd: int, data: Any) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwrite(fd, data, at) if at != NO_POSITION else _file.pwritev(fd, [data], at)

    if is_stored(mode):
        return _at_position(fd, mode, WRITE, writing)
    with using(fd):
        return _write_all(fd, mode, flat(data))


def writev(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwritev(fd, buffers, at)

    if is_stored(mode):
        return _at_position(fd, mode, WRITE, writing)
    with using(fd):
        if _is_blocking_pipe(fd, mode) or _is_blocking_terminal(fd, mode):
            return _write_all(fd, mode, memoryview(b''.join(buffers)))
        if _nbytes(buffers) > 0 and not _wait(fd, mode, WRITE):
            return _file.pwritev(fd, buffers, NO_POSITION)
        return posix.writev(fd, buffers)


def _nbytes(buffers: Sequence[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def is_stored(mode: int) -> bool:
    """Whether it never waits for anybody but a disk. *mode* may be the type alone."""
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def keeps_messages(fd: int, mode: int) -> bool:
    """Whether each write to it is a message, which may not come in pieces: a socket that is no stream."""
    if not stat.S_ISSOCK(mode):
        return False
    one = _socket.socket(fileno=fd)
    try:
        return one.type != _socket.SOCK_STREAM
    finally:
        one.detach()


def _is_blocking_terminal(fd: int, mode: int) -> bool:
    return stat.S_ISCHR(mode) and os.isatty(fd) and os.get_blocking(fd)


def _write_all(fd: int, mode: int, data: memoryview) -> int:
    """As a blocking write, in pieces that a pipe which is ready takes without waiting. A terminal is ready as
    soon as it has room for one byte, so a thread writes to it."""
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
