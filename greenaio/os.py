"""The file calls of `os`, cooperative: this greenlet waits, the hub does not.

Same signatures, results and errors, for every fd. One that was opened with ``os.O_DIRECT`` takes native AIO,
as does fsync; what the page cache has is read at once; anything that may wait takes a native thread of its
device. Each call asks what kind of file the fd is: `greenaio.File` remembers it, and is the fast way.
Called in the hub itself these raise BlockingSwitchOutError; only `close` works there.

If the greenlet is killed or timed out while it waits, a write may still happen, and a read may still write
into the caller's buffers, which stay pinned until it has; `pread` reads into memory of ours.
"""

from __future__ import annotations

import os as _os
from collections.abc import Sequence
from typing import Any, Protocol

from greenaio._files import position as _position
from greenaio._files import sharing as _sharing
from greenaio._files.extension import _calls, _file

__all__ = ['close', 'copy_file_range', 'fdatasync', 'fstat', 'fsync', 'ftruncate', 'open', 'posix_fallocate',
           'pread', 'preadv', 'pwrite', 'pwritev', 'read', 'readv', 'sendfile', 'stat', 'write', 'writev']


StrPath = str | bytes | _os.PathLike[str] | _os.PathLike[bytes]


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def open(path: StrPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open *path* and return an fd, not inheritable. Arguments and errors are as for os.open.

    If the greenlet is killed before it returns, the fd is closed when it comes.
    """
    fd = _calls.open(path, flags, mode, dir_fd=dir_fd)
    _sharing.ours[fd] = False           # the program knows the number
    return fd


def read(fd: int, n: int, /) -> bytes:
    """Read at most *n* bytes at the file's own position, which the kernel keeps and this moves on.

    Pipes, sockets and terminals: waits in the loop until there is something. Raises OSError.
    """
    return _position.read(fd, n)


def readv(fd: int, buffers: Sequence[Any], /) -> int:
    """`read` into a sequence of writable *buffers*; return the number of bytes read."""
    return _position.readv(fd, buffers)


def write(fd: int, data: Any, /) -> int:
    """Write bytes-like *data* at the file's own position; return the number of bytes written.

    Greenlets that use one fd take turns. Raises OSError.
    """
    return _position.write(fd, data)


def writev(fd: int, buffers: Sequence[Any], /) -> int:
    """`write` of a sequence of *buffers*; return the number of bytes written."""
    return _position.writev(fd, buffers)


# As they are, without a layer between: what a hit in the page cache costs is counted in tens of nanoseconds.
pread = _file.pread
preadv = _file.preadv
pwrite = _file.pwrite
pwritev = _file.pwritev


def fsync(fd: int | _HasFileno) -> None:
    """Make what was written to *fd* durable. An OSError is final: what was to be written may be lost."""
    _file.fsync(_fileno(fd))


def fdatasync(fd: int | _HasFileno) -> None:
    """As `fsync`, without the metadata that reading the data does not need. Raises OSError."""
    _file.fdatasync(_fileno(fd))


def ftruncate(fd: int, length: int, /) -> None:
    """Make the file *length* bytes long. Raises OSError."""
    _calls.ftruncate(fd, length, is_told=True)


def posix_fallocate(fd: int, offset: int, length: int, /) -> None:
    """Allocate *length* bytes at *offset*, so that writing there can't run out of space. Raises OSError."""
    _calls.posix_fallocate(fd, offset, length)


def copy_file_range(src: int, dst: int, count: int, offset_src: int | None = None,
                    offset_dst: int | None = None) -> int:
    """Copy up to *count* bytes between files in the kernel; return how many. Without an offset, the file's
    own position is used and moved on. Raises OSError."""
    return _calls.copy_file_range(src, dst, count, offset_src, offset_dst)


def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
    """Send up to *count* bytes of a file to a socket; return how many, 0 at the end of the file.

    Waits in the loop while a non-blocking socket is full. A *blocking* socket that is full keeps a thread of
    the file's device waiting for its peer: make it non-blocking, as gevent's are. Raises OSError.
    """
    return _calls.sendfile(out_fd, in_fd, offset, count)


def stat(path: int | StrPath, *, dir_fd: int | None = None,
         follow_symlinks: bool = True) -> _os.stat_result:
    """The os.stat_result of a path or an fd. Arguments and errors are as for os.stat."""
    return _calls.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)


def fstat(fd: int) -> _os.stat_result:
    """The os.stat_result of *fd*. Raises OSError."""
    return _calls.fstat(fd)


def close(fd: int) -> None:
    """Close *fd*. Requests that are queued on it go on to their end, and the number stays taken until then.

    Waits for the close itself where the file was open for writing or has no name left, but not in the hub.
    Raises OSError; EBADF if the number is being closed already.
    """
    _calls.close(fd)


def _fileno(fd: int | _HasFileno) -> int:
    if isinstance(fd, int):
        return fd
    if not hasattr(fd, 'fileno'):
        raise TypeError('argument must be an int, or have a fileno() method.')
    return fd.fileno()


assert all(hasattr(_os, name) for name in __all__)
