"""`read` and `write` at the kernel's own file position, which stays in the kernel.

Others look there: gunicorn and ``sendfile`` ask ``lseek(fd, 0, SEEK_CUR)``. But a thread inside read(2) holds
the position, and the hub's lseek would wait for it. So what takes a thread is a positional request between
two lseeks, and greenlets that use one fd take turns. What epoll accepts waits for the loop, as gevent does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gevent.lock import RLock

from greenaio._fallback import using, wait_for

try:
    from greenaio import _calls, _file
except ImportError:
    from greenaio import _fallback as _calls  # type: ignore[no-redef]
    from greenaio import _fallback as _file  # type: ignore[no-redef]

READ, WRITE = 1, 2              # what both loops call them
MEMORY = 1                      # the device number's major part of /dev/null, /dev/zero, /dev/urandom
PIPE_BUF = 4096                 # bytes: a pipe that poll says is writable takes as much without waiting

_turns: dict[int, tuple[RLock, list[None]]] = {}


@contextlib.contextmanager
def _turn(fd: int) -> Iterator[None]:
    """One greenlet at a time, for each fd."""
    lock, users = _turns.setdefault(fd, (RLock(), []))
    users.append(None)
    try:
        with lock:
            yield
    finally:
        users.pop()
        if not users:
            _turns.pop(fd, None)


def _wait(fd: int, mode: int, event: int) -> bool:
    """Wait for the loop to say that *fd* is ready, if it is one that epoll accepts; return whether so."""
    if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) and os.major(os.fstat(fd).st_rdev) == MEMORY:
        return False                    # os itself: an error, or /dev/null and the like
    if os.get_blocking(fd):
        wait_for(fd, event)
    return True


def _at_position(fd: int, call: Callable[[int], int]) -> int:
    """Make a positional request of what is asked for at the kernel's position, and move that on."""
    with _turn(fd), using(fd):
        at = os.lseek(fd, 0, os.SEEK_CUR)
        moved = call(at)
        if moved and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND and call.__name__ == 'writing':
            at = max(at, _calls.facts(fd)[1] - moved)    # the kernel wrote at the end
        os.lseek(fd, at + moved, os.SEEK_SET)
    return moved


def read(fd: int, n: int) -> bytes:
    mode = _calls.facts(fd)[0]
    data = b''

    def reading(at: int) -> int:
        nonlocal data
        data = _file.pread(fd, n, at)
        return len(data)

    if _is_stored(mode):
        _at_position(fd, reading)
        return data
    if n > 0:
        _wait(fd, mode, READ)
    return os.read(fd, n)


def readv(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]
    if _is_stored(mode):
        return _at_position(fd, lambda at: _file.preadv(fd, buffers, at))
    _wait(fd, mode, READ)
    return os.readv(fd, buffers)


def write(fd: int, data: Any) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwrite(fd, data, at)

    if _is_stored(mode):
        return _at_position(fd, writing)
    return _write_all(fd, mode, memoryview(data).cast('B'))


def writev(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwritev(fd, buffers, at)

    if _is_stored(mode):
        return _at_position(fd, writing)
    if stat.S_ISFIFO(mode) and os.get_blocking(fd):
        return _write_all(fd, mode, memoryview(b''.join(buffers)))
    _wait(fd, mode, WRITE)
    return os.writev(fd, buffers)


def _is_stored(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _write_all(fd: int, mode: int, data: memoryview) -> int:
    """As a blocking write, in pieces that a pipe which is ready takes without waiting."""
    written = 0
    while _wait(fd, mode, WRITE) and os.get_blocking(fd) and len(data) - written > PIPE_BUF:
        try:
            written += os.write(fd, data[written:written + PIPE_BUF])
        except OSError:
            if written:
                return written
            raise
    try:
        return written + os.write(fd, data[written:])
    except OSError:
        if written:
            return written
        raise
