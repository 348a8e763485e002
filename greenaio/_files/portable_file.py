"""`File`, and reads and writes of a raw fd, by Python threads, for builds without the extension."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import stat
from collections.abc import Callable, Sequence
from typing import Any, cast

from gevent import spawn

from greenaio._core.ends import thrown, was_thrown
from greenaio._files.arguments import StrPath
from greenaio._files.pool import call
from greenaio._files.portable import close, open
from greenaio._files.unclosed import warn_unclosed


class File:
    """``greenaio.File`` for builds without the extension. It has the same methods, and every call runs in a
    thread."""

    def __init__(self, path: StrPath, flags: int = os.O_RDONLY, mode: int = 0o666, *,
                 max_batch: int = 32, dir_fd: int | None = None) -> None:
        self.name: Any = os.fspath(path)
        self._fd = open(self.name, flags, mode, dir_fd=dir_fd)
        self._closefd = True

    @classmethod
    def from_fd(cls, fd: int, closefd: bool = False, *, max_batch: int = 32) -> File:
        posix.fstat(fd)
        self = cls.__new__(cls)
        self.name, self._fd, self._closefd = fd, fd, closefd
        return self

    @classmethod
    def open_for_io(cls, path: StrPath, flags: int, mode: str) -> File:
        return cls.from_fd(open(path, flags, 0o666, io_mode=mode))

    def close_for_io(self, fd: int, *, may_wait: bool, is_forgotten: bool) -> None:
        close(fd, may_wait=may_wait, is_forgotten=is_forgotten)

    def fileno(self) -> int:
        if self._fd < 0:
            raise ValueError('I/O operation on closed file')
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def direct(self) -> bool:
        return False

    @property
    def kind(self) -> int:
        return stat.S_IFMT(posix.fstat(self.fileno()).st_mode)

    @property
    def _seek_may_wait(self) -> bool:
        # Nothing has looked at the file system.
        return False

    @property
    def device(self) -> int:
        st = posix.fstat(self.fileno())
        return st.st_rdev if stat.S_ISBLK(st.st_mode) else st.st_dev

    @property
    def is_local(self) -> bool:
        # Nothing has looked at the file system, so assume a server.
        return False

    def _size(self, is_fresh: bool = False) -> int:
        return posix.fstat(self.fileno()).st_size

    @property
    def _is_answer(self) -> bool:
        # Nothing has looked at the file system.
        return False

    @property
    def alignment(self) -> int:
        return mmap.PAGESIZE if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT else 1

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(function, self.fileno(), *args)
        except OSError as error:
            if isinstance(self.name, int) or was_thrown(error):
                raise
            raise OSError(error.errno, error.strerror, self.name) from None

    def pread(self, n: int, offset: int) -> bytes:
        return cast(bytes, self._call(_pread, n, offset))

    def read_cached(self, buffer: Any) -> int:
        return -1

    def begin_at_position(self, reading: bool, buffers: Sequence[Any]) -> Underway:
        return Underway(posix.readv if reading else posix.writev, self.fileno(), buffers)

    def begin(self, reading: bool, buffer: Any, offset: int, more: bool = False) -> Any:
        return None

    def end(self, begun: Any) -> int:
        # `begin` never begins a request.
        raise NotImplementedError

    def preadv(self, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return cast(int, self._call(posix.preadv, buffers, offset, flags))

    def pwrite(self, data: Any, offset: int) -> int:
        return cast(int, self._call(posix.pwrite, data, offset))

    def pwritev(self, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return cast(int, self._call(posix.pwritev, buffers, offset, flags))

    def fsync(self) -> None:
        self._call(posix.fsync)

    def fdatasync(self) -> None:
        self._call(posix.fdatasync)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        # Python has no function for fallocate(2).
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._closefd:
            close(fd)

    def __enter__(self) -> File:
        self.fileno()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, '_fd', -1) >= 0 and self._closefd:
            try:
                warn_unclosed(self, 2)
            finally:
                self.close()

    def __repr__(self) -> str:
        return f'<greenaio.File name={self.name!r} fd={self._fd}>'


class Underway:
    """A read(2) or write(2) at the file's own position, which goes on if a greenlet that waits is killed."""

    def __init__(self, function: Callable[..., int], fd: int, buffers: Sequence[Any]) -> None:
        self._error: BaseException | None = None
        self._work = spawn(self._run, function, fd, buffers)

    def _run(self, function: Callable[..., int], fd: int, buffers: Sequence[Any]) -> int:
        try:
            return cast(int, call(function, fd, buffers))
        except BaseException as error:
            # `get` raises the error. Raised here, gevent would print it.
            self._error = error
            return -1

    def get(self) -> int:
        try:
            result = self._work.get()
        except BaseException as error:
            thrown(error)
            raise
        if self._error is not None:
            raise self._error
        return result

    def withdraw(self) -> bool:
        return False


def read_cached(fd: int, buffer: Any) -> int:
    return -1


class Filling(bytearray):
    """Memory that becomes a bytes object. Without the extension the bytes are a copy."""

    def resize(self, nbytes: int, /) -> None:
        del self[nbytes:]
        self.extend(bytes(nbytes - len(self)))

    def take(self, nbytes: int) -> bytes:
        return bytes(memoryview(self)[:nbytes])


def aligned_buffer(nbytes: int, alignment: int = 4096) -> memoryview:
    if nbytes < 0:
        raise ValueError(f'nbytes must not be negative, but is {nbytes}')
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f'alignment must be a power of two, not {alignment}')
    if alignment > mmap.PAGESIZE:
        raise ValueError('without the extension, alignment is a page at most')
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def _pread(fd: int, n: int, offset: int) -> bytes:
    try:
        return posix.pread(fd, n, offset)
    except OSError as error:
        if error.errno != errno.EINVAL or min(n, offset) < 0:
            raise
    # The file may be O_DIRECT, which refuses the memory of most bytes objects.
    buffer = aligned_buffer(n)
    return bytes(buffer[:posix.preadv(fd, [buffer], offset)])


def pread(fd: int, n: int, offset: int, /) -> bytes:
    """Make the call ``os.pread`` in a thread. Return its result. Raise OSError."""
    return cast(bytes, call(_pread, fd, n, offset))


def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """Make the call ``os.preadv`` in a thread. Return its result. Raise OSError."""
    return cast(int, call(posix.preadv, fd, buffers, offset, flags))


def pwrite(fd: int, data: Any, offset: int, /) -> int:
    """Make the call ``os.pwrite`` in a thread. Return its result. Raise OSError."""
    return cast(int, call(posix.pwrite, fd, data, offset))


def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """Make the call ``os.pwritev`` in a thread. Return its result. Raise OSError."""
    return cast(int, call(posix.pwritev, fd, buffers, offset, flags))


def fsync(fd: int) -> None:
    call(posix.fsync, fd)


def fdatasync(fd: int) -> None:
    call(posix.fdatasync, fd)
