"""Describe a request in words, without waiting."""

from __future__ import annotations

import posix  # not os, which may be patched
from typing import Any


def describe(operation: str, request: Any, where: str) -> tuple[str, str, int, int, str]:
    """(operation, file, offset, nbytes, way) of *request*, which is *where* `Engine.requests` says that it
    is. The file is a path as the kernel has it now; '' where there is none, or where its number means another
    file by now."""
    known = request.file
    is_open = known is None or known.is_open_as(request.fd)
    return operation, path_of(request.fd) if is_open else '', request.offset, request.nbytes, where


def path_of(fd: int) -> str:
    """The path of an open file as the kernel has it, which asks no disk; '' where there is none."""
    try:
        return posix.readlink(f'/proc/self/fd/{fd}') if fd >= 0 else ''
    except OSError:
        return ''
