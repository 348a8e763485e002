"""A greenlet inside `uninterrupted` is never parked. Its patched calls block, or raise if they would park it.

The dictionary is empty in most programs, and hot paths look at it first. Each entry belongs to one greenlet,
so no lock is needed. A kill leaves the block through `finally`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from greenlet import getcurrent, greenlet

from greenaio._core.bell import listen

REFUSED = ('inside greenaio.uninterrupted() no greenlet waits: use os and open there, '
           'instead of greenaio.os and File')

# The number of contexts that each greenlet is in.
inside: dict[greenlet, int] = {}


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
    # A thread without a hub has a greenlet, too, so one dictionary serves both.
    inside[me] = inside.get(me, 0) + 1
    try:
        yield
    finally:
        # Contexts may be nested, so only the outermost takes the entry out. A dead greenlet must not stay in
        # the dictionary, which would keep it.
        inside[me] -= 1
        if not inside[me]:
            del inside[me]


def is_uninterrupted() -> bool:
    """Return whether the caller is inside `uninterrupted`."""
    # The first test is enough in most programs.
    return bool(inside) and getcurrent() in inside


def thread_of(one: Any) -> Any:
    """Return the greenlet that the thread of *one* began with."""
    while one.parent is not None:
        one = one.parent
    return one


def _after_fork_in_child() -> None:
    """Drop the entries of other threads, which stayed with the parent."""
    # The child has one thread. A greenlet belongs to the thread in whose first greenlet its chain of parents
    # ends.
    here = thread_of(getcurrent())
    for one in list(inside):
        if thread_of(one) is not here:
            del inside[one]


listen(_after_fork_in_child)
