"""The positional calls of `os`, cooperative: this greenlet waits, the hub does not.

Same signatures, results and errors. An fd that was opened with ``os.O_DIRECT`` takes native AIO, as
does fsync; anything else takes a thread of ours, so every fd gets the answer that `os` would give. What
kind of file an fd is, is asked at each call: `greenaio.File` remembers it, and is the fast way. Called in
the hub itself these raise BlockingSwitchOutError; only `close` works there.

If the greenlet is killed or timed out while it waits, a write may still happen, and a read may still write
into the caller's buffers, which stay pinned until it has; `pread` reads into memory of ours.
"""

from __future__ import annotations

import os as _os
from collections.abc import Sequence
from typing import Any, Protocol

try:
    from greenaio import _file
except ImportError:
    from greenaio import _fallback as _file  # type: ignore[no-redef]

__all__ = ['close', 'fdatasync', 'fsync', 'open', 'pread', 'preadv', 'pwrite', 'pwritev']


StrPath = str | bytes | _os.PathLike[str] | _os.PathLike[bytes]


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def open(path: StrPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open *path* and return an fd, not inheritable. Arguments and errors are those of os.open.

    If the greenlet is killed meanwhile, the fd is closed when it comes.
    """
    return _file.open(path, flags, mode, dir_fd=dir_fd)


def pread(fd: int, n: int, offset: int, /) -> bytes:
    """Read at most *n* bytes at *offset* of the file *fd*; fewer only at its end, or as os.pread would.

    With O_DIRECT, *n* and *offset* must be aligned, the memory is. Raises OSError.
    """
    return _file.pread(fd, n, offset)


def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """Read at *offset* into a sequence of writable *buffers*; return the number of bytes read.

    *flags* are ``os.RWF_*``; one that can't be honoured raises OSError (EOPNOTSUPP).
    """
    return _file.preadv(fd, buffers, offset, flags)


def pwrite(fd: int, data: Any, offset: int, /) -> int:
    """Write bytes-like *data* at *offset*; return the number of bytes written. Raises OSError."""
    return _file.pwrite(fd, data, offset)


def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """Write a sequence of *buffers* at *offset*; return the number of bytes written.

    *flags* are ``os.RWF_DSYNC``, ``os.RWF_APPEND`` and the like; one that can't be honoured raises OSError.
    """
    return _file.pwritev(fd, buffers, offset, flags)


def fsync(fd: int | _HasFileno) -> None:
    """Make what was written to *fd* durable. An OSError is final: what was to be written may be lost."""
    _file.fsync(_fileno(fd))


def fdatasync(fd: int | _HasFileno) -> None:
    """As `fsync`, without the metadata that nobody needs to read the data. Raises OSError."""
    _file.fdatasync(_fileno(fd))


def close(fd: int) -> None:
    """Close *fd*. What is queued on it is submitted first; waits for nobody. Raises OSError."""
    _file.close(fd)


def _fileno(fd: int | _HasFileno) -> int:
    if isinstance(fd, int):
        return fd
    if not hasattr(fd, 'fileno'):
        raise TypeError('argument must be an int, or have a fileno() method.')
    return fd.fileno()


assert all(hasattr(_os, name) for name in __all__)
