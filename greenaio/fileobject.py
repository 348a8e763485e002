"""File objects whose reads and writes park the greenlet, not the hub; else they are those of `io`.

`open` is the built-in one, and `FileObject` is for gevent: ``GEVENT_FILE=greenaio.fileobject.FileObject``.
The position is the kernel's, so ``dup``, ``sendfile`` and whoever else looks there sees the same. Greenlets
that share an object queue. Where nobody can wait, in the hub, in a thread without a hub, at the
interpreter's end and in finalizers, the plain blocking call is made: no buffered byte is lost.

One thing is not as it was: if a greenlet is killed while its append is under way, that may still happen, and
what was buffered is written once more when the file is flushed again.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import io
import operator
import os
import posix  # not os: these are called as they are, whatever was patched
import stat
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent

# Not from gevent.fileobject: that asks for our FileObject while it is being imported.
from gevent._fileobjectcommon import FileObjectBase, FileObjectThread, OpenDescriptor, cancel_wait_ex
from gevent._fileobjectposix import FileObjectPosix  # type: ignore[import-not-found]
from gevent._hub_local import get_hub_if_exists
from gevent.lock import DummySemaphore
from greenlet import getcurrent, greenlet

from greenaio._core.ends import was_thrown
from greenaio._core.handle import inode_of_facts, using
from greenaio._core.uninterrupted import is_uninterrupted
from greenaio._files import pollable as _pollable
from greenaio._files import pool as _pool
from greenaio._files import position as _position
from greenaio._files import ranges, streams
from greenaio._files import sharing as _sharing
from greenaio._files import turn as _turn
from greenaio._files.arguments import flat
from greenaio._files.extension import File, Filling, _calls
from greenaio._files.streams import ReadAhead, WriteBehind
from greenaio._files.turn import Turn
from greenaio._files.unclosed import warn_unclosed
from greenaio._files.waiter import can_wait

__all__ = ['BufferedRWPair', 'BufferedRandom', 'BufferedReader', 'BufferedWriter', 'FileIO', 'FileObject',
           'TextIOWrapper', 'open']

Opener = Callable[[Any, int], int]

FLAGS = {'r': os.O_RDONLY, 'w': os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
         'x': os.O_WRONLY | os.O_CREAT | os.O_EXCL, 'a': os.O_WRONLY | os.O_CREAT | os.O_APPEND}
OURS = ('greenaio.fileobject', 'greenaio.monkey')
GROW_MIN = 8192                 # bytes: of what grows while it is read, as in `io`
STANDARD = ('greenaio.fileobject', '_io')   # modules of classes that stand for those of `io`

_io_open = io.open              # noqa: UP020  # the one that is there before anybody patches it


def level_of_caller() -> int:
    """The stacklevel, for `warnings.warn`, of the first frame that is not ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get('__name__') in OURS and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


class _Carrier(BaseException):
    """Carries an OSError that was thrown into a wait through the C code of `io`, which takes BlockingIOError
    and EINTR for answers of its raw file. The layer that the caller called raises the error itself."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


class _End:
    """The end of a file, for those that append to it with O_DIRECT. The kernel would append whole sectors
    only, so each looks for the end: one at a time, and after what the others have put there, or will put."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.appenders: weakref.WeakValueDictionary[int, FileIO] = weakref.WeakValueDictionary()


_ends: weakref.WeakValueDictionary[tuple[int, int], _End] = weakref.WeakValueDictionary()   # by device, inode


class FileIO(io.FileIO):
    """The raw layer: `io.FileIO` with cooperative system calls. *flags* are ``os.O_*`` besides those of
    *mode*. With O_DIRECT, up to *prefetch* blocks are read ahead and written behind, see `streams`."""

    _blksize: int
    _ahead: ReadAhead | None = None
    _behind: WriteBehind | None = None
    _file: File | None = None
    _fd = -1
    _owner: Any = None                  # whose fd it is, if it is not just a number
    _closes = False
    _seek_may_wait = False              # see `File`
    _appends = False                    # each write goes to the end, which is ours to find ...
    _end: _End | None = None            # ... here
    _unsaid: Warning | None = None      # for `__del__`, whose errors Python reports
    _is_fresh = False                   # opened by this object, and neither read nor written so far
    _was_cached = False                 # the last read was one of the page cache, and short only at the end
    _piece = 0                          # bytes at most in one write, if the layers above look how many went

    def __init__(self, file: Any, mode: str = 'r', closefd: bool = True, opener: Opener | None = None, *,
                 flags: int = 0, prefetch: int | None = None) -> None:
        self._io_turn = Turn(guards_io=True)   # shared by the layers above
        self._waiting: dict[greenlet, tuple[Any, bool]] = {}
        opened = file if isinstance(file, int) else self._open(file, mode, closefd, opener, flags)
        fd = opened if isinstance(opened, int) else opened.fileno()
        if not isinstance(file, int) and opener is None:
            _sharing.ours[fd] = True
        try:
            self._take(fd, file, mode, None if isinstance(opened, int) else opened)
            self._is_fresh = _sharing.is_ours(fd) and 'a' not in mode and self._surely_has_position()
        except BaseException:
            if not isinstance(file, int):
                _calls.close(fd, may_wait=can_wait())
            raise
        self._closes = closefd
        if self._appends:
            facts = (_calls.fstat if can_wait() else posix.fstat)(fd)
            self._end = _ends.setdefault((facts.st_dev, facts.st_ino), _End())
            self._end.appenders[id(self)] = self
        if self.file.direct and prefetch is None or prefetch:
            self._stream(prefetch)

    def _stream(self, prefetch: int | None) -> None:
        gevent.get_hub()                # it is asked for by name, in a thread that has none as well
        file = self.file
        if not self.seekable() or file._is_answer:
            return                      # it has no position, or each read of it is another answer
        if self.readable() and _position.is_stored(file.kind):
            self._ahead = ReadAhead(file, prefetch or streams.DEPTH, eager=prefetch is not None)
        in_order = fcntl.fcntl(self._fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_DSYNC)
        if self.writable() and file.direct and not in_order:
            self._behind = WriteBehind(file, prefetch or streams.DEPTH)

    def _open(self, file: Any, mode: str, closefd: bool, opener: Opener | None,
              more: int) -> int | File:
        if not closefd:
            raise ValueError('Cannot use closefd=False with file name')
        flags = FLAGS.get(mode.replace('b', '').replace('+', '', 1), 0) | os.O_CLOEXEC | more
        if '+' in mode:
            flags = flags & ~os.O_WRONLY | os.O_RDWR
        elif flags & os.O_DIRECT and flags & os.O_WRONLY:
            # What is misaligned is read, changed and written.
            with contextlib.suppress(PermissionError):
                return self._open(file, mode + '+', closefd, opener, more)
        if flags & os.O_APPEND and flags & os.O_DIRECT:
            flags &= ~os.O_APPEND       # the kernel would append whole sectors only
            self._appends = True
        if opener is None:
            if can_wait():
                return File.open_for_io(file, flags, mode)
            return _calls.open_here(file, flags, 0o666, io_mode=mode)
        sys.audit('open', file, mode, flags)
        fd = opener(file, flags)
        if not isinstance(fd, int):
            raise TypeError('expected integer from opener')
        if fd < 0:
            raise ValueError(f'opener returned {fd}')
        posix.set_inheritable(fd, False)
        return fd

    def _take(self, fd: int, name: Any, mode: str, file: File | None) -> None:
        if fd < 0:
            raise ValueError('negative file descriptor')
        if file is None:
            file = File.from_fd(fd)
        if file.kind == stat.S_IFDIR:
            raise IsADirectoryError(21, os.strerror(21), name)
        seek_may_wait = 'a' in mode and (file._seek_may_wait or not _sharing.is_ours(fd))
        if file.is_local and not seek_may_wait or not can_wait():
            super().__init__(fd, mode, False)   # it is not io.FileIO that closes it
        else:
            _calls.initialize(self, fd, mode, not _sharing.is_ours(fd))
        self._file, self._fd, self.name = file, fd, name
        self._seek_may_wait = file._seek_may_wait

    def isatty(self) -> bool:
        """Whether it is a terminal. No other file than a character device is asked: it may be a server's."""
        return self.file.kind == stat.S_IFCHR and super().isatty()

    def fileno(self) -> int:
        """The number, which from now on is not known to this object alone."""
        fd = super().fileno()
        _sharing.tell(fd)
        return fd

    @property
    def closefd(self) -> bool:
        """Whether `close` closes the fd."""
        return self._closes

    @property
    def file(self) -> File:
        """The `greenaio.File` below it, for requests at any position."""
        if self._file is None or self.closed:
            raise ValueError('I/O operation on closed file')
        return self._file

    def readinto(self, buffer: Any, /) -> Any:
        file = self.file
        if not self.readable():
            raise io.UnsupportedOperation('File not open for reading')
        self._is_fresh = self._was_cached = False
        if not self._can_wait():
            with self._plain():
                return posix.readv(self._fd, [buffer])
        if type(buffer) is memoryview and buffer.nbytes > streams.BLOCK_MAX and buffer.obj is None:
            buffer = buffer[:streams.BLOCK_MAX]     # of io's C code, which asks again: it takes a copy
        if self._ahead is not None:
            return self._wait(False, self._read_ahead, buffer)
        try:
            n = -1 if _position.is_busy(self._fd) else file.read_cached(buffer)
        except (BufferError, TypeError):
            raise TypeError('readinto() argument must be read-write bytes-like object, '
                            f'not {type(buffer).__name__}') from None
        self._was_cached = n >= 0
        if n >= 0:
            return n
        n = -1 - n
        if n == 0:
            return self._wait(False, self._read_on, file, buffer, 0)
        return n + (self._wait(False, self._read_on, file, flat(buffer)[n:], n) or 0)

    def _read_on(self, fd: int, file: File, buffer: Any, before: int) -> int:
        return _position.read_on(file, [buffer], before)

    def _read_ahead(self, fd: int, buffer: Any) -> int:
        assert self._ahead is not None
        with using(fd), _turn.turn_of(fd):
            self._drain()
            at = _position.seek(self.file, 0, os.SEEK_CUR)
            n = self._ahead.readinto(buffer, at)
            _position.seek(self.file, at + n, os.SEEK_SET)
        return n

    def _to_the_end(self, fd: int) -> int:
        assert self._end is not None
        for appender in list(self._end.appenders.values()):
            appender._drain()
        _calls.settle(fd)
        return _calls.lseek(fd, 0, os.SEEK_END, not _sharing.is_ours(fd))

    def _turn_with_end(self) -> contextlib.AbstractContextManager[None]:
        """Before that with the position: who has this waits for those of others."""
        return contextlib.nullcontext() if self._end is None else _turn.taking(self._end.turn)

    def _drain(self) -> None:
        """Have what was taken to be written behind written."""
        if self._behind is None or self._behind.is_idle:
            return
        if self._can_wait():
            self._wait(True, self._drain_in_turn)
        else:
            self._refuse_if_held()
            with self._alone(), self._through_the_cache():
                self._behind.write_plainly(self._fd)

    def _drain_in_turn(self, fd: int) -> None:
        with using(fd), _turn.turn_of(fd):
            if self._behind is not None:
                self._behind.drain()

    def flush(self) -> None:
        super().flush()
        self._drain()

    def read(self, size: int | None = -1, /) -> bytes | None:       # type: ignore[override]
        if type(size) is not int:
            size = -1 if size is None else operator.index(size)
        if size < 0:
            return self.readall()
        data = Filling(size)
        n = self.readinto(data)
        return None if n is None else data.take(n)

    def readall(self) -> bytes | None:      # type: ignore[override]
        size = 0
        self._drain()
        try:
            size = self.file._size(self._is_fresh) - self.tell()
        except OSError as error:        # a pipe has no position
            if was_thrown(error):
                raise
        # One byte more than it has, so that the end shows without more memory.
        data = Filling(size + 1 if size > 0 else io.DEFAULT_BUFFER_SIZE)
        piece = streams.BLOCK_MAX if self.file.direct else len(data)    # bounds the copy for O_DIRECT
        done = 0
        while True:
            if done == len(data):       # it grew, or its size says nothing
                data.resize(done + max(done >> 3 if done > io.DEFAULT_BUFFER_SIZE << 3 else done, GROW_MIN))
            wanted = min(max(piece, GROW_MIN), len(data) - done)
            try:
                n = self.readinto(memoryview(data)[done:done + wanted])
            except BaseException as error:
                if was_thrown(error) and self._file is not None:
                    _position.go_back(self._file, done)
                raise
            if not n:
                return None if n is None and not done else data.take(done)
            done += n
            # The kernel was asked for more, and said that it is the end. A method of a subclass may have made
            # the file longer since.
            is_end = n < wanted and self._was_cached and not self.file._is_answer
            if is_end and type(self).readinto is FileIO.readinto:
                return data.take(done)

    def write(self, data: Any, /) -> Any:
        if not self.writable():
            raise io.UnsupportedOperation('File not open for writing')
        self._is_fresh = False
        if self._can_wait():
            return self._wait(True, self._write, data)
        self._refuse_if_held()
        with self._plain():
            if self._ahead is not None:
                self._ahead.stop()
            if self._appends:
                os.lseek(self._fd, 0, os.SEEK_END)
            return posix.write(self._fd, data)

    def _write(self, fd: int, data: Any) -> int:
        file = self.file
        if self._piece and len(data) > self._piece:
            return _position.write_to(file, flat(data)[:self._piece])
        if self._ahead is None and self._behind is None and not self._appends:
            return _position.write_to(file, data)
        with self._turn_with_end(), using(fd), _turn.turn_of(fd):
            if self._ahead is not None:
                self._ahead.stop()      # in our turn: a reader could begin to read ahead again before
            if self._behind is None:
                if self._appends:
                    self._to_the_end(fd)
                return _position.write_to(file, data)
            at = _position.seek(self.file, 0, os.SEEK_CUR)
            if self._appends and (self._behind.is_idle or at != self._behind.end):
                at = self._to_the_end(fd)
            n = self._behind.write(data, at)
            _position.seek(self.file, at + n, os.SEEK_SET)
        return n

    def _refuse_if_held(self) -> None:
        """Raise BlockingSwitchOutError inside `uninterrupted`, if a parked greenlet is changing sectors."""
        if self.file.direct and is_uninterrupted() and not self._io_turn.finalizing:
            ranges.refuse_if_held(inode_of_facts(posix.fstat(self._fd)))

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """The turn with the position; at the end nobody else can go on, and nobody waits."""
        stored = _position.is_stored(self.file.kind)
        if stored and not self._io_turn.finalizing and not sys.is_finalizing():
            return _turn.turn_of(self._fd)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """For a call that blocks; what would block all the same ends it."""
        with self._alone():
            self._drain()
            with self._through_the_cache() if self.file.direct else contextlib.nullcontext(), \
                    contextlib.suppress(BlockingIOError):
                yield

    @contextlib.contextmanager
    def _through_the_cache(self) -> Iterator[None]:
        """O_DIRECT would refuse odd bytes, and a finalizer may have some left to write."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        try:
            yield
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if self._is_fresh:
            if offset == 0 and whence < os.SEEK_END and not self.closed and _sharing.ours.get(self._fd):
                return 0                # no other code can have moved it
            self._is_fresh = False
        if whence >= os.SEEK_END:
            self._drain()
        if not self._can_wait():
            if _position.is_busy(self._fd) and is_uninterrupted() and not self._io_turn.finalizing:
                with _turn.turn_of(self._fd):       # it is about to be moved
                    return super().seek(offset, whence)
            return super().seek(offset, whence)
        if not _position.is_busy(self._fd) and self._seeks_at_once(whence):
            return super().seek(offset, whence)
        return int(self._wait(True, self._seek, offset, whence))

    def _seeks_at_once(self, whence: int) -> bool:
        """Whether a seek looks at nothing that may have to be fetched, and waits for no other call."""
        if not _position.is_stored(self.file.kind):
            return True
        return whence < os.SEEK_END and not self._seek_may_wait and _sharing.is_ours(self._fd)

    def _surely_has_position(self) -> bool:
        file = self.file
        return file.is_local and _position.is_stored(file.kind) and not file._is_answer

    def _seek(self, fd: int, offset: int, whence: int) -> int:
        with using(fd), _turn.turn_of(fd):
            return _calls.lseek(fd, offset, whence, not _sharing.is_ours(fd))

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def seekable(self) -> bool:
        if self._file is None or self.closed or not self._can_wait() or self._seeks_at_once(os.SEEK_CUR):
            return super().seekable()
        try:
            self.tell()
        except OSError as error:
            if was_thrown(error):
                raise
            return False
        return True

    def truncate(self, size: int | None = None, /) -> int:
        if not self._can_wait():
            self._refuse_if_held()
            with self._alone():
                self._drain()
                if self._ahead is not None:
                    self._ahead.stop()
                return super().truncate(size)
        if not self.writable():
            raise io.UnsupportedOperation('File not open for writing')
        self._drain()
        if size is None:
            size = self.tell()
        self._wait(True, self._truncate, size)
        return size

    def _truncate(self, fd: int, size: int) -> None:
        with using(fd), _turn.turn_of(fd):
            if self._ahead is not None:
                self._ahead.stop()
            _calls.ftruncate(fd, size)

    def close(self) -> None:
        """Close it. Greenlets that wait for it get OSError (EBADF); their memory stays the kernel's as long
        as it needs it."""
        if self.closed:
            return
        try:
            self._drain()
        except BaseException as error:  # killed, it is not closed: somebody may flush it yet
            if not was_thrown(error):
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        try:
            waits = self._can_wait()
        finally:
            fd, self._fd = self._fd, -1
            self.end_waits()
            if self._ahead is not None:
                self._ahead.stop()
            self._ahead = self._behind = None
            try:
                super().close()         # calls `flush`, which a program may have replaced
            finally:
                self._close_fd(fd, waits)

    def _close_fd(self, fd: int, may_wait: bool) -> None:
        try:
            if self._closes and fd >= 0 and self._owner is None:
                assert self._file is not None
                self._file.close_for_io(fd, may_wait=may_wait, is_forgotten=self._io_turn.finalizing)
        finally:
            owner, self._owner = self._owner, None
            if owner is not None and self._closes:
                owner.close()

    def end_waits(self, writing: bool = True) -> None:
        """Let those who wait for a read, and if *writing* those who wait for a write, get EBADF."""
        for waiter, (hub, writes) in list(self._waiting.items()):
            loop = hub.loop             # None if its thread has ended
            if loop is not None and (writing or not writes):
                loop.run_callback_threadsafe(self._end_wait, waiter)

    def _end_wait(self, waiter: greenlet) -> None:
        if waiter in self._waiting:     # it is parked in there, and nowhere else
            waiter.throw(cancel_wait_ex())

    def _wait(self, writing: bool, call: Callable[..., Any], *args: Any) -> Any:
        """The result of a cooperative *call* on the fd, which `close` ends."""
        me = getcurrent()
        before = self._waiting.get(me)  # a read drains what is to be written first
        self._waiting[me] = get_hub_if_exists(), writing
        try:
            return call(self._fd, *args)
        except OSError as error:
            if was_thrown(error):
                if self._io_turn.owner is me:      # a layer above called
                    raise _Carrier(error) from None
                raise
            if not isinstance(error, BlockingIOError):
                raise
            return None
        finally:
            if before is None:
                del self._waiting[me]
            else:
                self._waiting[me] = before

    def _can_wait(self) -> bool:
        return can_wait() and not self._io_turn.finalizing

    def _dealloc_warn(self, source: object) -> None:
        if self._fd >= 0 and self._closes and self._owner is None:
            try:
                warn_unclosed(source, level_of_caller())
            except Warning as error:    # the layers of io above would drop it
                self._unsaid = error.with_traceback(None)       # which has us

    def __del__(self) -> None:
        if self._file is None:          # nor is there a turn, perhaps
            return
        self._io_turn.finalizing = True
        try:
            if not self.closed:
                self._dealloc_warn(self)
        finally:
            self.close()
        if self._unsaid is not None:
            raise self._unsaid

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(max(protocol, 2))  # 0 and 1 make one of io's on it, which closes it

    def __repr__(self) -> str:
        module = '_io' if type(self).__module__ in STANDARD else type(self).__module__
        kind = f'{module}.{type(self).__qualname__}'
        if self.closed:
            return f'<{kind} [closed]>'
        name = f'name={self.name!r}' if hasattr(self, 'name') else f'fd={self._fd}'
        return f'<{kind} {name} mode={self.mode!r} closefd={self.closefd!r}>'


# The layers of `io` above it ---------------------------------------------------------------------

def _in_turn(method: Callable[..., Any], plain: Callable[..., Any],
             which: str = '_io_turn') -> Callable[..., Any]:
    """*method*, for one greenlet at a time: `io` raises RuntimeError for the second, or mixes their bytes.

    *plain* is the method of `io` itself, for an object that has no turn: one that is not initialized, or of
    a subclass that was there before the patch, and that calls ``io.BufferedWriter.write(self, data)``.
    """
    @functools.wraps(method)
    def in_turn(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            turn: Turn = getattr(self, which)
            me, owner = getcurrent(), turn.owner
        except AttributeError:
            return plain(self, *args, **kwargs)
        except RuntimeError:            # the interpreter is being finalized
            return method(self, *args, **kwargs)
        if owner is None:
            turn.owner = me
        elif owner is me:
            return method(self, *args, **kwargs)
        try:
            if owner is not None:
                turn.wait()
            return method(self, *args, **kwargs)
        except _Carrier as carrier:
            raise carrier.error from None
        finally:
            if turn.owner is me:        # not in a forked child, when that took it
                if not turn.queue:
                    turn.owner = None
                else:
                    try:
                        turn.leave()
                    finally:
                        if turn.owner is me:
                            turn.leave()

    return in_turn


def _close_anyway(method: Callable[..., Any], layer: Any) -> None:
    """After an error, which the caller raises: that closing tells the same error again adds nothing."""
    try:
        method(layer)
    except Exception as error:
        if was_thrown(error):
            raise


def _close_in_turn(method: Callable[..., Any], flush: Callable[..., Any]) -> Callable[..., Any]:
    """*method*, the ``close`` of a class of `io`, so that a greenlet that is killed in it loses nothing.

    `io` closes the raw file whatever its flush raises, and drops what is buffered. So *flush*, the one of
    the class itself, goes first. A flush that the program put in its place is called as `io` calls it.
    Where the raw file is not ours all is as in `io`.
    """
    def flush_and_close(self: Any) -> None:
        is_over = self._io_turn.finalizing or self.closed
        if not is_over and _raw_of(self) is not None and self.writable():
            try:
                flush(self)
            except BaseException as error:
                if not was_thrown(error):   # else it stays open, because it may be flushed later
                    _close_anyway(method, self)
                raise
        method(self)

    in_turn = _in_turn(flush_and_close, method)

    @functools.wraps(method)
    def close(self: Any) -> None:
        turn = getattr(self, '_io_turn', None)
        if turn is not None and getattr(self, '_finalizing', False):
            turn.finalizing = True
        if turn is None or turn.owner is None or sys.is_finalizing() or self.closed:
            in_turn(self)
            return
        raw = _raw_of(self)
        if raw is None:
            in_turn(self)
            return
        turn.refuse_if_stuck()          # before any other greenlet hears of it
        # Who reads is sent away, and who stands behind. What is being written is written first.
        me = getcurrent()
        turn.closers.append(me)
        raw.end_waits(writing=False)
        try:
            in_turn(self)
        except cancel_wait_ex:
            if not self.closed:
                raise                   # else another was quicker
        finally:
            if not self.closed:
                turn.closers.remove(me)     # killed

    return close


def _raw_of(layer: Any) -> FileIO | None:
    """The raw file below a layer, if it is one of ours. Raises ValueError if that was detached."""
    raw = getattr(getattr(layer, 'buffer', layer), 'raw', None)
    return raw if isinstance(raw, FileIO) else None


def _is_layer(file: Any) -> bool:
    """Whether *file* is cooperative down to the raw file."""
    return isinstance(file, _Shared) and _raw_of(file) is not None


class _Shared:
    """A layer of `io` that greenlets may share.

    It stands on any raw file, or on any object that `io` takes for one. If that is ours, or such a layer,
    they have one turn; otherwise it is a turn of this layer. Attributes are named ``_io_...``, because a
    program may make subclasses of these classes, with attributes of its own.
    """

    _io_turn: Turn

    def _io_share(self, below: Any) -> None:
        turn = getattr(below, '_io_turn', None)
        self._io_turn = turn if isinstance(turn, Turn) else Turn(guards_io=True)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(max(protocol, 2))  # 0 and 1 make one of io's on it, which closes it

    def __repr__(self) -> str:
        text = super().__repr__()
        return f'<_io.{text[1:].removeprefix("_io.")}' if type(self).__module__ in STANDARD else text


IN_TURN = ('detach', 'flush', 'peek', 'read', 'read1', 'readinto', 'readinto1', 'readline', 'reconfigure',
           'seek', 'tell', 'truncate', 'write', 'writelines')


def _shared(kind: type) -> type:
    """Give *kind* the methods of the class of `io` that it derives from, in turn. Only these: what a subclass
    overrides may have a lock of its own, to be taken before the turn."""
    plain: Any = next(one for one in kind.__mro__ if one.__module__ == '_io')
    below = 'buffer' if hasattr(plain, 'buffer') else 'raw'

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        if isinstance(self, _Shared):       # else it is of an older subclass of io's
            self._io_share(getattr(self, below))

    for name in IN_TURN:
        if hasattr(plain, name):
            setattr(kind, name, _in_turn(getattr(kind, name), getattr(plain, name)))
    kind.__init__ = functools.wraps(plain.__init__)(__init__)       # type: ignore[misc]
    kind.close = _close_in_turn(plain.close, kind.flush)    # type: ignore[attr-defined]
    kind.__doc__ = plain.__doc__
    return kind


@_shared
class BufferedReader(_Shared, io.BufferedReader):
    pass


class _Writes(_Shared):
    """What both that write do besides `io`: flush the raw file, and lose nothing of who is killed above."""

    _io_is_below_text = False           # and above a raw file of ours
    _io_kept: tuple[bytes, ...] = ()    # what the text layer has let go of, and this has not got yet

    def _io_share(self, below: Any) -> None:
        super()._io_share(below)
        _writers[id(self)] = self

    def write(self, data: Any, /) -> Any:
        if not self._io_is_below_text or self.raw is None:  # type: ignore[attr-defined]
            return super().write(data)  # type: ignore[misc]
        if type(data) is not bytes:
            with memoryview(data) as view:
                if not view.c_contiguous:
                    raise BufferError('memoryview: underlying buffer is not C-contiguous')
                data = view.tobytes()
        self._io_kept = (*self._io_kept, data)
        self._io_write_kept()
        return len(data)

    def _io_write_kept(self) -> None:
        # Of what its buffer can hold io takes all or nothing; of more it can't say how much went.
        raw: Any = self.raw             # type: ignore[attr-defined]
        if raw is None or not self._io_kept:    # None once detached
            return
        piece = raw._piece
        taken = 0                       # of the last of them
        try:
            while self._io_kept:
                data = self._io_kept[0]
                n = min(piece or len(data), len(data))
                super().write(data[:n])                     # type: ignore[misc]
                taken = taken + n if n < len(data) else 0
                self._io_kept = (data[n:], *self._io_kept[1:]) if n < len(data) else self._io_kept[1:]
        except BaseException as error:
            if not was_thrown(error):
                if isinstance(error, BlockingIOError):
                    error.characters_written += taken
                self._io_kept = ()      # as io: the greenlet that wrote it knows
            raise

    def flush(self) -> None:
        self._io_write_kept()
        super().flush()                 # type: ignore[misc]
        raw: Any = self.raw             # type: ignore[attr-defined]
        if isinstance(raw, FileIO):
            raw._drain()


@_shared
class BufferedWriter(_Writes, io.BufferedWriter):
    pass


@_shared
class BufferedRandom(_Writes, io.BufferedRandom):
    pass


@_shared
class TextIOWrapper(_Shared, io.TextIOWrapper):
    def _io_share(self, below: Any) -> None:
        super()._io_share(below)
        self._io_turn.favours_leaver = True     # so the pieces of a line that `print` writes stay together
        if isinstance(below, _Writes) and _raw_of(self) is not None:
            below._io_is_below_text = True
        if self.writable():
            _writers[id(self)] = self


class BufferedRWPair(_Shared, io.BufferedRWPair):
    """Two raw files, one to read and one to write. Each has its turn: a reader that waits for a peer does not
    hold up the writer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._io_turn, self._io_write_turn = Turn(guards_io=True), Turn(guards_io=True)


for _name in ('peek', 'read', 'read1', 'readinto', 'readinto1', 'readline', 'close'):
    _method = getattr(io.BufferedRWPair, _name)
    setattr(BufferedRWPair, _name, _in_turn(_method, _method))
for _name in ('write', 'writelines', 'flush', 'close'):
    _method = getattr(BufferedRWPair, _name)
    setattr(BufferedRWPair, _name, _in_turn(_method, getattr(io.BufferedRWPair, _name), '_io_write_turn'))


def open(file: Any, mode: str = 'r', buffering: int = -1, encoding: str | None = None,
         errors: str | None = None, newline: str | None = None, closefd: bool = True,
         opener: Opener | None = None, *, direct: bool = False, dsync: bool = False,
         prefetch: int | None = None) -> Any:
    """Open *file* as the built-in ``open`` does, with the same arguments, results and errors; cooperative.

    With *direct* the page cache is left out (O_DIRECT); any position, size and memory will do. To append is
    then to write at the end as it is just before: only one process should. With *dsync* each write is on the
    disk when it returns (O_DSYNC). Both are for paths: ValueError with an fd.

    *prefetch* is how many blocks are read ahead from the first read on; 0 for none. Without it, *direct*
    files have up to 8, once they are read in order; and are written behind the writer by as many, with errors
    at `flush` or `close` at the latest. A block has 128 KiB, or what is read at a time, up to 1 MiB.
    """
    if prefetch is not None and prefetch < 0:
        raise ValueError(f'prefetch must not be negative, but is {prefetch}')
    if not isinstance(file, (int, str, bytes)):
        file = operator.index(file) if hasattr(file, '__index__') else os.fspath(file)
    if isinstance(file, int) and (direct or dsync):
        raise ValueError('direct and dsync are for a path, not for a file that is open')
    buffering = operator.index(buffering)
    if encoding is None and isinstance(mode, str) and 'b' not in mode:
        encoding = io.text_encoding(None, level_of_caller())   # it may warn
    _check_arguments(mode, buffering, encoding, errors, newline)
    flags = (os.O_DIRECT if direct else 0) | (os.O_DSYNC if dsync else 0)
    raw = FileIO(file, _raw_mode(mode), closefd, opener, flags=flags, prefetch=prefetch)
    try:
        return _layers(raw, mode, buffering, encoding, errors, newline)
    except BaseException:
        raw.close()
        raise


@functools.lru_cache(64)
def _raw_mode(mode: str) -> str:
    """The mode of the raw file, as `io.open` makes it of its own."""
    return ''.join(letter for letter in 'xrwa+' if letter in mode.replace('U', 'r'))


def _check_arguments(mode: str, buffering: int, encoding: str | None, errors: str | None,
                     newline: str | None) -> None:
    """Raise what `io` raises for them, and warn as it does."""
    for value, kind, what in ((mode, str, 'mode'), (buffering, int, 'buffering')):
        if not isinstance(value, kind):
            raise TypeError(f'open() argument {what!r} must be {kind.__name__}, not {type(value).__name__}')
    with contextlib.suppress(OSError):      # no /dev/null, or no fd: then opening it will say
        _are_accepted(mode, buffering == 0, encoding, errors, newline)
    if 'U' in mode:                         # until Python 3.10
        warnings.warn("'U' mode is deprecated", DeprecationWarning, stacklevel=level_of_caller())
    if buffering == 1 and 'b' in mode:
        warnings.warn("line buffering (buffering=1) isn't supported in binary mode, the default buffer size "
                      'will be used', RuntimeWarning, stacklevel=level_of_caller())


@functools.lru_cache(256)
def _are_accepted(mode: str, unbuffered: bool, encoding: str | None, errors: str | None,
                  newline: str | None) -> None:
    """Let `io` itself judge, on a file that it need not wait for."""
    harmless = mode.replace('x', 'w') if mode.count('x') == 1 and 'w' not in mode else mode
    buffering = 0 if unbuffered and 'b' not in mode else -1
    with warnings.catch_warnings():         # said by the caller, with the caller's line
        warnings.filterwarnings('ignore', "'U' mode", DeprecationWarning)
        _io_open(os.devnull, harmless, buffering, encoding, errors, newline).close()


def _layers(raw: FileIO, mode: str, buffering: int, encoding: str | None, errors: str | None,
            newline: str | None) -> Any:
    """What ``open`` puts on top of the raw file."""
    by_line = buffering == 1 or buffering < 0 and raw.isatty()
    size = buffering
    if by_line or size < 0:
        size = max(raw._blksize, io.DEFAULT_BUFFER_SIZE)
    if size == 0 and 'b' in mode:
        if raw._behind is not None:
            _writers[id(raw)] = raw
        return raw
    if not _position.is_stored(raw.file.kind) and not _pollable.keeps_messages(raw.fileno(), raw.file.kind):
        raw._piece = min(_pollable.PIPE_BUF, size)  # killed between two pieces, it is known what is left
    layer: Any = BufferedRandom if '+' in mode else BufferedReader if raw.readable() else BufferedWriter
    result: Any = layer(raw, size)
    if 'b' not in mode:
        result = TextIOWrapper(result, io.text_encoding(encoding), errors, newline, by_line)
        result.mode = mode
    return result


# Files that may have something buffered, by id, because a subclass need not be hashable.
_writers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@atexit.register
def _flush_all() -> None:
    """While there is a Python to do it: those that are still there when the modules go could not."""
    for file in list(_writers.values()):
        with contextlib.suppress(Exception):    # as `io`, which can tell nobody either
            if file.closed:
                continue
            if file._io_turn.owner is None:
                file._io_turn.finalizing = True
            elif not isinstance(file, FileIO):
                raw = _raw_of(file)
                if raw is None or not _position.is_stored(raw.file.kind):
                    continue            # its owner may wait for the reader of a pipe for ever
            file.flush()


# For gevent --------------------------------------------------------------------------------------

class _Descriptor(OpenDescriptor):                  # type: ignore[type-arg]
    """gevent's reading of the arguments, with our layers."""

    _fobj: Any
    _opened: Any
    newline: Any

    def _do_open_raw(self) -> Any:
        fobj = self._fobj
        if _is_layer(fobj):
            return fobj
        if not hasattr(fobj, 'fileno'):
            return FileIO(fobj, self.fileio_mode, self.closefd)
        raw: Any = FileIO(fobj.fileno(), self.fileio_mode, self.closefd)
        raw._owner = fobj
        try:
            raw.name = fobj.name
        except AttributeError:
            del raw.name
        return raw

    def opened(self) -> Any:
        if self._opened is None:
            raw = self.opened_raw()
            try:
                self._opened = self._layers_on(raw)
            except BaseException:
                if raw is not self._fobj:
                    raw.close()
                raise
        return self._opened

    def _layers_on(self, raw: Any) -> Any:
        if not _is_layer(raw):
            return _layers(raw, self.mode, self.buffering, self.encoding, self.errors, self.newline)
        if self.binary or isinstance(raw, TextIOWrapper):
            return raw
        return TextIOWrapper(raw, self.encoding, self.errors, self.newline, self.buffering == 1)


class FileObject(FileObjectBase):                   # type: ignore[type-arg]
    """A file object for gevent, with its signature:

    ``FileObject(fobj, mode='r', buffering=-1, closefd=True, encoding=None, errors=None, newline=None)``, also
    with *bufsize* and *close* as names of *buffering* and *closefd*. *fobj* is a path, an fd, or an object
    with ``fileno()``. What epoll accepts (pipes, sockets, terminals) becomes gevent's `FileObjectPosix`; an
    object that has a buffer of its own keeps it, and takes threads, in a `FileObjectThread` of gevent's.

    *lock* and *threadpool* are those of `FileObjectThread`. A lock of the caller's own is held during each
    call. True and False make no difference here, because greenlets that share a file take turns anyway. The
    pool does the work only in a `FileObjectThread`: other files have native threads of their device.
    """

    lock: Any
    threadpool: Any

    def __new__(cls, fobj: Any, *args: Any, lock: Any = True, threadpool: Any = None, **kwargs: Any) -> Any:
        if isinstance(fobj, FileObject):
            fobj = fobj.io
        if hasattr(fobj, 'read') and not isinstance(fobj, io.RawIOBase) and not _is_layer(fobj):
            return _by_threadpool(threadpool, fobj, *args, lock=lock, **kwargs)
        is_own = lock is not True and lock      # which FileObjectPosix would not take
        if is_own and not hasattr(lock, '__enter__'):
            raise TypeError(f'Expected a Semaphore or boolean, got {type(lock)!r}')
        descriptor = _Descriptor(fobj, *args, **kwargs)
        raw: Any = descriptor.opened_raw()
        if cls is FileObject and not is_own and isinstance(raw, FileIO) and _is_pollable(raw):
            return _by_epoll(raw, fobj, *args, **kwargs)
        self: Any = super().__new__(cls)
        self._descriptor = descriptor
        self.lock, self.threadpool = lock if is_own else DummySemaphore(), threadpool
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.__dict__.pop('_descriptor'))

    def _wrap_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        lock = self.lock
        if isinstance(lock, DummySemaphore):
            return method

        @functools.wraps(method)
        def locked(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return method(*args, **kwargs)

        return locked

    def _do_close(self, fobj: Any, closefd: bool) -> None:
        with self.lock:
            if closefd or isinstance(fobj, FileIO):
                fobj.close()
            else:
                fobj.flush()


def _by_threadpool(pool: Any, fobj: Any, *args: Any, **kwargs: Any) -> Any:
    pool = _pool.thread_pool() if pool is None else pool
    file: Any = FileObjectThread(fobj, *args, threadpool=pool, **kwargs)
    if file.threadpool is not pool:     # gevent takes an idle pool, whose length is 0, for none
        file.threadpool = pool
        file._do_delegate_methods()
    return file


def _is_pollable(raw: FileIO) -> bool:
    kind = raw.file.kind
    return kind in (0, stat.S_IFIFO, stat.S_IFSOCK) or kind == stat.S_IFCHR and raw.isatty()


def _by_epoll(raw: FileIO, fobj: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(fobj, int) or hasattr(fobj, 'fileno'):
        raw._closes, raw._owner = False, None       # gevent takes it as it was given
        raw.close()
        return FileObjectPosix(fobj, *args, **kwargs)
    return FileObjectPosix(raw, *args, **kwargs)    # it owns the fd, and gevent closes it
