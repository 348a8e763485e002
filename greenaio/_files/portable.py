"""The calls of `_files.calls` and `_files.file`, by Python threads, for builds without the extension."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import stat as _stat
from collections.abc import Callable, Sequence
from io import FileIO
from typing import Any, cast

from gevent import spawn

from greenaio._core.ends import thrown, was_thrown
from greenaio._core.handle import Handle, check_open, handle_of, take, using
from greenaio._files.arguments import EXTENTS_MAX, StrPath
from greenaio._files.loop import WRITE, lose, wait_for
from greenaio._files.loop import has_position as has_position
from greenaio._files.place import Place
from greenaio._files.place import working_directory as working_directory
from greenaio._files.pool import call
from greenaio._files.pool import renew_threads as renew_threads
from greenaio._files.unclosed import warn_unclosed


def settle(fd: int) -> None:
    """Do nothing, because these builds know nothing of writes that are under way."""


_umask = 0
_umask_changes = 0


def learn_umask() -> None:
    """Learn the umask before `umask` changes it, unless a sandbox denies both."""
    global _umask
    with contextlib.suppress(OSError):
        # A file that another thread creates at this moment gets too few permissions and none too many.
        _umask = posix.umask(0o077)
        posix.umask(_umask)


def umask(mask: int, /) -> int:
    """Set the umask as `os.umask` does, and return the old one. A file that was asked for before, and is
    created later, still gets no bit that the old umask forbids."""
    global _umask, _umask_changes
    _umask_changes += 1
    old = posix.umask(mask)
    _umask = mask & 0o777
    return old


def open_here(path: StrPath, flags: int, mode: int, *, io_mode: str | None = None) -> int:
    """Open *path* as `open` does, but block the calling thread. Return the fd. Raise OSError."""
    return posix.open(path, flags, mode)


def open(path: StrPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None,
         io_mode: str | None = None) -> int:
    """Open *path* as ``os.open`` does, in a native thread. Return the fd. Raise OSError. If the greenlet is
    killed during the call, the fd is closed."""
    opened: list[int] = []
    left: list[bool] = []
    place = Place(dir_fd)
    changes, umask_then = _umask_changes, _umask

    def take_back() -> None:
        # `pop` gives the fd to only one of the two threads.
        with contextlib.suppress(IndexError):
            posix.close(opened.pop())

    def work(_: int) -> None:
        narrowed = mode if changes == _umask_changes else mode & ~umask_then
        opened.append(posix.open(path, flags, narrowed, dir_fd=place.dir_fd))
        if left:
            take_back()

    try:
        call(work, -1 if dir_fd is None else dir_fd)
        return opened.pop()
    except BaseException:
        left.append(True)
        take_back()
        raise


def close(fd: int, *, may_wait: bool = False, is_forgotten: bool = False) -> None:
    """Close *fd* when all operations that need its number are over, without a wait for them. Raise OSError:
    EBADF if it is being closed already."""
    check_open(fd)
    lose(fd)
    if handle_of(fd) is None:
        posix.close(fd)
        return
    # Take the handle first, because its last user, a worker, may let go of it at this moment.
    handle = take(fd)
    handle.close_with(Handle.close_number)
    handle.let_go()


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
        return _stat.S_IFMT(posix.fstat(self.fileno()).st_mode)

    @property
    def _seek_may_wait(self) -> bool:
        # Nothing has looked at the file system.
        return False

    @property
    def device(self) -> int:
        st = posix.fstat(self.fileno())
        return st.st_rdev if _stat.S_ISBLK(st.st_mode) else st.st_dev

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


def ftruncate(fd: int, length: int, *, is_told: bool = False) -> None:
    call(posix.ftruncate, fd, length)


def posix_fallocate(fd: int, offset: int, length: int) -> None:
    call(posix.posix_fallocate, fd, offset, length)


def copy_file_range(src: int, dst: int, count: int, offset_src: int | None = None,
                    offset_dst: int | None = None) -> int:
    return cast(int, call(posix.copy_file_range, src, dst, count, offset_src, offset_dst))


def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
    # The numbers stay taken, also during the wait for the socket.
    with using(in_fd), using(out_fd):
        while True:
            try:
                return cast(int, call(posix.sendfile, out_fd, in_fd, offset, count))
            except BlockingIOError as error:
                if was_thrown(error):
                    raise
            wait_for(out_fd, WRITE)


def stat(path: int | StrPath, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
    place = Place(dir_fd) if not isinstance(path, int) else None

    def work(_: int) -> os.stat_result:
        where = place.dir_fd if place is not None else dir_fd
        return posix.stat(path, dir_fd=where, follow_symlinks=follow_symlinks)

    return cast(os.stat_result, call(work, -1 if dir_fd is None else dir_fd))


def fstat(fd: int) -> os.stat_result:
    return cast(os.stat_result, call(posix.fstat, fd))


def readahead(fd: int, offset: int, count: int) -> None:
    call(posix.posix_fadvise, fd, offset, count, os.POSIX_FADV_WILLNEED)


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    # Python has no function for sync_file_range(2), and the copy is right without it.
    pass


def lseek(fd: int, offset: int, whence: int, is_shared: bool = False) -> int:
    return cast(int, call(posix.lseek, fd, offset, whence)) if is_shared else posix.lseek(fd, offset, whence)


def unlink(path: StrPath) -> None:
    call(lambda _: posix.unlink(path), -1)


def ioctl(fd: int, number: int, argument: bytes) -> bytes:
    memory = bytearray(argument)
    call(fcntl.ioctl, fd, number, memory, True)
    return bytes(memory)


def extents(fd: int, offset: int, end: int) -> list[tuple[int, bool]]:
    return cast(list[tuple[int, bool]], call(_extents, fd, offset, end))


def _extents(fd: int, offset: int, end: int) -> list[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    while offset < end and len(found) < EXTENTS_MAX:
        try:
            data = min(posix.lseek(fd, offset, os.SEEK_DATA), end)
            hole = min(posix.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                # No data follows.
                data = hole = end
            elif found:
                return found
            else:
                raise
        found += [(n, is_data) for n, is_data in ((data - offset, False), (hole - data, True)) if n]
        offset = hole
    return found


def initialize(raw: Any, fd: int, mode: str, is_shared: bool = False) -> None:
    call(lambda _: FileIO.__init__(raw, fd, mode, False), fd)
