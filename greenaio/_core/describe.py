"""Describe a request in words, without waiting."""

from __future__ import annotations

import posix  # not patched
from typing import Any


def describe(operation: str, request: Any, where: str) -> tuple[str, str, int, int, str]:
    """Return (operation, file, offset, nbytes, way) of *request*, which is *where* `Engine.requests` says
    that it is.

    The file is a path as the kernel has it now. It is '' if there is none, or if the number means another
    file by now. *offset* and *nbytes* are in bytes.
    """
    # A request that is done with its number no longer keeps it. So the number may belong to another file, and
    # its path would mislead.
    known = request.file
    is_open = known is None or known.is_open_as(request.fd)
    return operation, path_of(request.fd) if is_open else '', request.offset, request.nbytes, where


def path_of(fd: int) -> str:
    """Return the path of an open file as the kernel has it, or '' if there is none. This asks no disk."""
    try:
        return posix.readlink(f'/proc/self/fd/{fd}') if fd >= 0 else ''
    except OSError:
        return ''
