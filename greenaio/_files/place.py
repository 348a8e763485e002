"""The place where a Python thread begins to look up a path: the working directory at the moment of the
call."""

from __future__ import annotations

import contextlib
import fcntl
import os

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix


def working_directory() -> int:
    """Return a new O_PATH fd of the working directory. Raise OSError."""
    return posix.open('.', os.O_PATH | os.O_CLOEXEC)


def _is_path_fd(fd: int) -> bool:
    """Return whether *fd* is an O_PATH fd. A daemon may have closed all numbers, and may have opened files
    of its own on them."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH != 0
    except OSError:
        return False


class Place:
    """The place where a thread begins to look up a path: *dir_fd*, or the present working directory if that
    is None."""

    __slots__ = ('_is_ours', 'dir_fd')

    def __init__(self, dir_fd: int | None) -> None:
        self._is_ours = False
        self.dir_fd = dir_fd
        if dir_fd is None:
            # If no fd is free, the thread begins in the working directory at the time of its call.
            with contextlib.suppress(OSError):
                self.dir_fd = working_directory()
                self._is_ours = True

    def __del__(self) -> None:
        if self._is_ours and self.dir_fd is not None and _is_path_fd(self.dir_fd):
            posix.close(self.dir_fd)
