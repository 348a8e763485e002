"""Report files that the program forgot to close."""

from __future__ import annotations

import warnings
from typing import Any

from gevent import getcurrent

_warning: set[Any] = set()      # greenlets that report a file which was not closed


def warn_unclosed(source: object, stacklevel: int = 1) -> None:
    """Warn that *source* was not closed. *stacklevel* counts from the caller, as for `warnings.warn`.

    ``warnings.showwarning`` may itself forget a file. Its greenlet then reports no second one: each report
    would make the next, and where the recursion ends with RecursionError, a frame below would begin again.
    """
    try:
        me = getcurrent()
    except RuntimeError:                # the interpreter is being finalized
        return
    if me in _warning:
        return
    _warning.add(me)
    try:
        warnings.warn(f'unclosed file {source!r}', ResourceWarning, source=source, stacklevel=stacklevel + 1)
    finally:
        _warning.discard(me)
