"""The calls of `_files.calls`, by Python threads, for builds without the extension."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
from io import FileIO
from typing import Any, cast

from greenaio._core.ends import was_thrown
from greenaio._core.handle import Handle, check_open, handle_of, take, using
from greenaio._files.arguments import EXTENTS_MAX, StrPath
from greenaio._files.loop import WRITE, lose, wait_for
from greenaio._files.loop import has_position as has_position
from greenaio._files.place import Place
from greenaio._files.place import working_directory as working_directory
from greenaio._files.pool import call


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
