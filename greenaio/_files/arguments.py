"""Arguments of calls on files: paths, and buffers."""

from __future__ import annotations

import os
from typing import Any

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
EXTENTS_MAX = 1024      # extents that one call asks of the kernel


def flat(buffer: Any) -> memoryview:
    """Return the bytes of *buffer*, without its shape. A shape with a zero in it can't be cast away."""
    view = memoryview(buffer)
    return view.cast('B') if view.nbytes else memoryview(bytearray())
