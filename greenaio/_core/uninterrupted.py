"""A greenlet inside `uninterrupted` is never parked: its patched calls block, and what would park it raises.

The dictionary is empty in most programs, and hot paths look at it first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from greenlet import getcurrent, greenlet

from greenaio._core.bell import listen

REFUSED = ('inside greenaio.uninterrupted() no greenlet waits: use os and open there, '
           'instead of greenaio.os and File')

inside: dict[greenlet, int] = {}        # how many contexts each greenlet is in


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside this context the calling greenlet keeps the hub: patched calls and file objects block.

    Use it around code that holds something unknown to gevent over a file call: a lock made before the patch,
    a transaction of `sqlite3`, the working directory. No other greenlet of this thread runs until the call is
    over. It holds for the greenlet that enters it, or for a thread without a hub, and may be nested.

    `greenaio.os` and `File` raise BlockingSwitchOutError inside, because their caller asks for cooperation by
    name; only `close` works. Patched calls and file objects raise it if a parked greenlet is using the same
    file object, position or sectors, because that greenlet can't go on as long as this one blocks.

    gevent's own calls still switch: `gevent.sleep`, sockets, locks of `threading`, and so `logging`.
    """
    me = getcurrent()
    inside[me] = inside.get(me, 0) + 1
    try:
        yield
    finally:
        inside[me] -= 1
        if not inside[me]:
            del inside[me]


def is_uninterrupted() -> bool:
    """Whether the caller is inside `uninterrupted`."""
    return bool(inside) and getcurrent() in inside


def thread_of(one: Any) -> Any:
    """The greenlet that its thread began with."""
    while one.parent is not None:
        one = one.parent
    return one


def _after_fork_in_child() -> None:
    here = thread_of(getcurrent())
    for one in list(inside):
        if thread_of(one) is not here:      # its thread stayed with the parent
            del inside[one]


listen(_after_fork_in_child)
