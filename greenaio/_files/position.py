"""`read` and `write` at the kernel's own file position, which stays in the kernel.

Other code looks at it: gunicorn and ``sendfile`` ask ``lseek(fd, 0, SEEK_CUR)``. Code that has the same open
file may also move it, see `_sharing`. A write, and a read of a file that may be shared, is therefore one
write(2) or read(2) in a thread: the kernel moves the position when the bytes land, and two writers lose no
byte. A thread inside such a call has the lock of the position, and an lseek of the hub would wait for it.
So greenlets that use one number take turns, and a turn lasts until the thread has returned:

    ==========================  =====================================  ==================================
    the greenlet                the thread                             other greenlets
    ==========================  =====================================  ==================================
    takes the turn, parks       is in read(2), waits for the disk      wait for the turn
    is killed, and goes         goes on                                wait: `_Rest` has the turn now
    .                           returns; if the file is surely ours,   the next has the turn
                                the position is put back
    ==========================  =====================================  ==================================

An O_DIRECT file, and a file whose number only its file object knows, takes a positional request between two
lseeks instead. Then no thread has the lock while it waits, and a killed reader has read nothing at once.
A file that epoll accepts waits for the loop, as in gevent.
"""

from __future__ import annotations

import _socket  # not socket, which may be gevent's
import contextlib
import errno
import fcntl
import operator
import os
import posix  # not os: these are called as they are, whatever was patched
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gevent.monkey import get_original

from greenaio._core.ends import was_thrown
from greenaio._core.handle import inode_of_facts, using
from greenaio._files import sectors as alignment
from greenaio._files.arguments import flat
from greenaio._files.extension import File, Filling, _calls, _file
from greenaio._files.loop import READ, WRITE, has_position, wait_for
from greenaio._files.sectors import Shielded
from greenaio._files.sharing import is_ours, ours
from greenaio._files.turn import turn_of, turns

epoll = get_original('select', 'epoll')     # gevent takes it away

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
            alignment.refuse_if_held(inode_of_facts(facts), start, end)
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


def seek(file: File, offset: int, whence: int) -> int:
    """lseek; by a thread where another process or thread may have the lock of the position."""
    fd = file.fileno()
    if file._seek_may_wait or not is_ours(fd):
        return _calls.lseek(fd, offset, whence, not is_ours(fd))
    return posix.lseek(fd, offset, whence)


def is_busy(fd: int) -> bool:
    """Whether a greenlet is about to move the position of *fd*."""
    turn = turns.get(fd)
    return turn is not None and turn.owner is not None


def _between_seeks(file: File, call: Callable[[int], Any]) -> Any:
    """Make a request at the kernel's position a positional one, and move that position on. Return what
    *call* returns, bytes or how many."""
    at = seek(file, 0, os.SEEK_CUR)
    result = call(at)
    moved = len(result) if isinstance(result, bytes) else result
    if moved:
        seek(file, at + moved, os.SEEK_SET)
    return result


class _Rest:
    """The turn with a position whose greenlet was killed while a thread reads or writes there for it.

    A greenlet of its own keeps the turn until the thread has returned. No caller gets the bytes of a read, so
    this greenlet also puts the position back, if the file is surely ours.
    """

    def __init__(self, file: File, begun: Any, reading: bool) -> None:
        self.back = 0                   # bytes that the killed greenlet had read before, and loses, too
        self._file, self._begun, self._reading = file, begun, reading
        self._fd = file.fileno()
        self._turn = turns[self._fd]
        self._greenlet: Any = None
        self._greenlet = Shielded(self._fd, self._work, self).greenlet
        self._turn.owner, _rests[self._fd] = self._greenlet, self

    def _work(self) -> int:
        got: int = 0
        try:
            got = self._begun.get()
        finally:
            back = self.back + (got if self._reading else 0)
            if back and is_ours(self._fd):
                seek(self._file, -back, os.SEEK_CUR)
        return got

    def let_go(self) -> None:
        if _rests.get(self._fd) is self:
            del _rests[self._fd]
        if self._greenlet is not None and self._turn.owner is self._greenlet:
            self._turn.leave()


_rests: dict[int, _Rest] = {}           # by fd


def _in_thread(file: File, reading: bool, buffers: Sequence[Any]) -> int:
    """One read(2) or write(2) at the position, in its turn."""
    begun = file.begin_at_position(reading, buffers)
    try:
        return begun.get()
    except BaseException as error:
        if was_thrown(error) and not begun.withdraw():
            with contextlib.suppress(OSError, MemoryError):     # closed: then no other call is made there
                _Rest(file, begun, reading)
        raise


def go_back(file: File, n: int) -> None:
    """Put the position back by *n* bytes that a killed greenlet had read. If another process or thread may
    have read on, the bytes are lost, as in a killed thread."""
    fd = file.fileno()
    if not n or not is_ours(fd):
        return
    if fd in _rests:
        _rests[fd].back += n
    elif is_busy(fd) or file._seek_may_wait:    # a killed greenlet does not wait
        Shielded(fd, lambda: _seek_in_turn(file, -n))
    else:
        _seek_back(fd, n)


def _seek_back(fd: int, n: int) -> None:
    with contextlib.suppress(OSError):  # a pipe has no position
        posix.lseek(fd, -n, os.SEEK_CUR)


def _seek_in_turn(file: File, offset: int) -> int:
    with turn_of(file.fileno()):
        return seek(file, offset, os.SEEK_CUR) if is_ours(file.fileno()) else 0


def _read_stored(file: File, buffers: Sequence[Any]) -> int:
    fd = file.fileno()
    with using(fd):
        if not has_position(fd, READ):
            return file.preadv(buffers, NO_POSITION)
        with turn_of(fd):
            if file._seek_may_wait and stat.S_ISREG(file.kind):     # the kernel makes it up, by a wait or not
                return file.preadv(buffers, NO_POSITION)
            if ours.get(fd) or _is_direct(file):    # only a file object knows the number, if it is not direct
                return int(_between_seeks(file, lambda at: file.preadv(buffers, at)))
            return _in_thread(file, True, buffers)


def _write_stored(file: File, buffers: Sequence[Any]) -> int:
    fd = file.fileno()
    with using(fd):
        if not has_position(fd, WRITE):
            return file.pwritev(buffers, NO_POSITION)
        with turn_of(fd):
            if not _is_direct(file):
                return _in_thread(file, False, buffers)
            n = int(_between_seeks(file, lambda at: file.pwritev(buffers, at)))
            if n and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                seek(file, 0, os.SEEK_END)      # where the kernel wrote
            return n


def _is_direct(file: File) -> bool:
    return file.alignment > 1


def read(fd: int, n: int) -> bytes:
    n = operator.index(n)
    if not 0 <= n <= sys.maxsize or n == 0 and fd in ours:
        return posix.read(fd, n)        # it says what is wrong
    data: Any = None
    if fd in ours:
        data = Filling(n)
        return bytes(data.take(readv(fd, [data])))
    file = File.from_fd(fd)
    if not is_stored(file.kind):
        return _read_stream(fd, file.kind, n)
    if _is_direct(file):
        with using(fd), turn_of(fd):
            return bytes(_between_seeks(file, lambda at: file.pread(n, at)))
    data = Filling(n)
    return bytes(data.take(_read_stored(file, [data])))


def _read_stream(fd: int, mode: int, n: int) -> bytes:
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
    if fd in ours and type(buffers) in (list, tuple) and len(buffers) == 1 and memoryview(buffers[0]).nbytes:
        return _read_one(fd, buffers[0])
    return read_on(File.from_fd(fd), buffers)


def _read_one(fd: int, buffer: Any) -> int:
    """Read what the page cache has, and the rest by a thread."""
    n = -1 if is_busy(fd) else _file.read_cached(fd, buffer)
    if n >= 0:
        return n
    got = -1 - n
    return got + read_on(File.from_fd(fd), [flat(buffer)[got:] if got else buffer], got)


def read_on(file: File, buffers: Sequence[Any], before: int = 0) -> int:
    """Read, after the first *before* bytes that the page cache had. An error other than a kill, and after
    some bytes, is for the next call to find."""
    try:
        if is_stored(file.kind):
            return _read_stored(file, buffers)
        return _readv_stream(file.fileno(), file.kind, buffers)
    except BaseException as error:
        if was_thrown(error):
            go_back(file, before)
        elif before:
            return 0
        raise


def _readv_stream(fd: int, mode: int, buffers: Sequence[Any]) -> int:
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
    return write_to(File.from_fd(fd), data)


def write_to(file: File, data: Any) -> int:
    if is_stored(file.kind):
        return _write_stored(file, [data])
    fd = file.fileno()
    with using(fd):
        return _write_all(fd, file.kind, flat(data))


def writev(fd: int, buffers: Sequence[Any]) -> int:
    file = File.from_fd(fd)
    mode = file.kind
    if is_stored(mode):
        return _write_stored(file, buffers)
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
