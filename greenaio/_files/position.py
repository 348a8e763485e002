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

import contextlib
import fcntl
import operator
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any

from greenaio._core.ends import was_thrown
from greenaio._core.handle import inode_of_facts, using
from greenaio._files import pollable as _pollable
from greenaio._files import ranges
from greenaio._files.arguments import flat
from greenaio._files.extension import File, Filling, _calls, _file
from greenaio._files.loop import READ, WRITE, has_position
from greenaio._files.pollable import NO_POSITION, nbytes_of
from greenaio._files.sharing import is_ours, ours
from greenaio._files.shield import Shielded
from greenaio._files.turn import turn_of, turns


def blocking(call: Callable[..., Any], *args: Any, place: int = 0, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, a call of `posix` by a greenlet inside `uninterrupted`. The argument
    at *place* is the fd of the file that the call reads or changes.

    Parked greenlets may be in the middle of a read or write at the file's position, or of its sectors. Raise
    BlockingSwitchOutError if they are.
    """
    fd = args[place]
    facts = posix.fstat(fd)
    if not is_stored(facts.st_mode):
        return call(*args, **kwargs)
    name = call.__name__
    with turn_of(fd) if name in ('read', 'readv', 'write', 'writev') else contextlib.nullcontext():
        if name not in ('read', 'readv'):
            start, end = 0, ranges.EVERYTHING
            if name in ('pwrite', 'pwritev'):
                try:
                    start, end = args[2], args[2] + nbytes_of([args[1]] if name == 'pwrite' else args[1])
                except (TypeError, IndexError):
                    # The call itself tells which argument is wrong.
                    return call(*args, **kwargs)
            ranges.refuse_if_held(inode_of_facts(facts), start, end)
        return call(*args, **kwargs)


def seek(file: File, offset: int, whence: int) -> int:
    """Move the position of *file*. Return the new one, in bytes. Raise OSError. A thread makes the call if
    another process or thread may hold the lock of the position."""
    fd = file.fileno()
    if file._seek_may_wait or not is_ours(fd):
        return _calls.lseek(fd, offset, whence, not is_ours(fd))
    return posix.lseek(fd, offset, whence)


def is_busy(fd: int) -> bool:
    """Return whether a greenlet is about to move the position of *fd*."""
    turn = turns.get(fd)
    return turn is not None and turn.owner is not None


def _between_seeks(file: File, call: Callable[[int], Any]) -> Any:
    """Make a positional request at the kernel's position by ``call(offset)``, and move the position on.
    Return the result of *call*: bytes or their number. If the greenlet is killed in *call*, the position
    stays."""
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
        # In bytes: the killed greenlet had read these before, and loses them, too.
        self.back = 0
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
        """Give the turn back, when the thread has returned."""
        if _rests.get(self._fd) is self:
            del _rests[self._fd]
        if self._greenlet is not None and self._turn.owner is self._greenlet:
            self._turn.leave()


_rests: dict[int, _Rest] = {}           # by fd


def _in_thread(file: File, reading: bool, buffers: Sequence[Any]) -> int:
    """Make one read(2) or write(2) at the position, in a thread. Return bytes moved. The caller has the turn;
    if it is killed, a `_Rest` keeps the turn until the thread has returned."""
    begun = file.begin_at_position(reading, buffers)
    try:
        return begun.get()
    except BaseException as error:
        if was_thrown(error) and not begun.withdraw():
            # If the file is closed, no other call is made at its position, and no `_Rest` is needed.
            with contextlib.suppress(OSError, MemoryError):
                _Rest(file, begun, reading)
        raise


def go_back(file: File, n: int) -> None:
    """Put the position back by *n* bytes that a killed greenlet had read. If another process or thread may
    have read on, the bytes are lost, as they are when a thread is killed."""
    fd = file.fileno()
    if not n or not is_ours(fd):
        return
    if fd in _rests:
        _rests[fd].back += n
    elif is_busy(fd) or file._seek_may_wait:
        # A killed greenlet does not wait, so another greenlet does it.
        Shielded(fd, lambda: _seek_in_turn(file, -n))
    else:
        _seek_back(fd, n)


def _seek_back(fd: int, n: int) -> None:
    with contextlib.suppress(OSError):
        # A pipe has no position.
        posix.lseek(fd, -n, os.SEEK_CUR)


def _seek_in_turn(file: File, offset: int) -> int:
    with turn_of(file.fileno()):
        return seek(file, offset, os.SEEK_CUR) if is_ours(file.fileno()) else 0


def _read_stored(file: File, buffers: Sequence[Any]) -> int:
    """Read into *buffers* at the position of a stored file, in its turn. Return bytes read."""
    fd = file.fileno()
    with using(fd):
        if not has_position(fd, READ):
            return file.preadv(buffers, NO_POSITION)
        with turn_of(fd):
            if file._seek_may_wait and stat.S_ISREG(file.kind):
                # The kernel makes the answer, with a wait or without.
                return file.preadv(buffers, NO_POSITION)
            # A file that is not O_DIRECT comes here only if its file object alone knows the number.
            if ours.get(fd) or _is_direct(file):
                return int(_between_seeks(file, lambda at: file.preadv(buffers, at)))
            return _in_thread(file, True, buffers)


def _write_stored(file: File, buffers: Sequence[Any]) -> int:
    """Write *buffers* at the position of a stored file, in its turn. Return bytes written."""
    fd = file.fileno()
    with using(fd):
        if not has_position(fd, WRITE):
            return file.pwritev(buffers, NO_POSITION)
        with turn_of(fd):
            if not _is_direct(file):
                return _in_thread(file, False, buffers)
            n = int(_between_seeks(file, lambda at: file.pwritev(buffers, at)))
            if n and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                # The kernel wrote at the end, so that is the new position.
                seek(file, 0, os.SEEK_END)
            return n


def _is_direct(file: File) -> bool:
    return file.alignment > 1


def read(fd: int, n: int) -> bytes:
    """Read up to *n* bytes at the position of *fd*, as `os.read` does. Raise OSError."""
    n = operator.index(n)
    if not 0 <= n <= sys.maxsize or n == 0 and fd in ours:
        # The plain call raises the right error.
        return posix.read(fd, n)
    data: Any = None
    if fd in ours:
        data = Filling(n)
        return bytes(data.take(readv(fd, [data])))
    file = File.from_fd(fd)
    if not is_stored(file.kind):
        return _pollable.read_stream(fd, file.kind, n)
    if _is_direct(file):
        with using(fd), turn_of(fd):
            return bytes(_between_seeks(file, lambda at: file.pread(n, at)))
    data = Filling(n)
    return bytes(data.take(_read_stored(file, [data])))


def readv(fd: int, buffers: Sequence[Any]) -> int:
    """Read into *buffers* at the position of *fd*, as `os.readv` does. Return bytes read. Raise OSError."""
    if fd in ours and type(buffers) in (list, tuple) and len(buffers) == 1 and memoryview(buffers[0]).nbytes:
        return _read_one(fd, buffers[0])
    return read_on(File.from_fd(fd), buffers)


def _read_one(fd: int, buffer: Any) -> int:
    """Read the bytes that the page cache has inline, and the rest by a thread. Return bytes read."""
    n = -1 if is_busy(fd) else _file.read_cached(fd, buffer)
    if n >= 0:
        return n
    got = -1 - n
    return got + read_on(File.from_fd(fd), [flat(buffer)[got:] if got else buffer], got)


def read_on(file: File, buffers: Sequence[Any], before: int = 0) -> int:
    """Read into *buffers*, after the first *before* bytes came from the page cache. Return bytes read.

    If the greenlet is killed, put the position back by *before*. Another error after some bytes is left to
    the next call, because these bytes are a result."""
    try:
        if is_stored(file.kind):
            return _read_stored(file, buffers)
        return _pollable.readv_stream(file.fileno(), file.kind, buffers)
    except BaseException as error:
        if was_thrown(error):
            go_back(file, before)
        elif before:
            return 0
        raise


def write(fd: int, data: Any) -> int:
    """Write *data* at the position of *fd*, as `os.write` does. Return bytes written. Raise OSError."""
    return write_to(File.from_fd(fd), data)


def write_to(file: File, data: Any) -> int:
    """Write *data* at the position of *file*. Return bytes written. Raise OSError."""
    if is_stored(file.kind):
        return _write_stored(file, [data])
    fd = file.fileno()
    with using(fd):
        return _pollable.write_all(fd, file.kind, flat(data))


def writev(fd: int, buffers: Sequence[Any]) -> int:
    """Write *buffers* at the position of *fd*, as `os.writev` does. Return bytes written. Raise OSError."""
    file = File.from_fd(fd)
    if is_stored(file.kind):
        return _write_stored(file, buffers)
    return _pollable.writev_stream(fd, file.kind, buffers)


def is_stored(mode: int) -> bool:
    """Return whether a file of that st_mode waits for a disk only. *mode* may be the type alone."""
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)
