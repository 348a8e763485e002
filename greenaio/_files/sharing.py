"""Know the open files that only this process has, under one number. No other code moves their position.

The position belongs to the kernel's *open file description*. A description may have several numbers (`dup`)
and several processes (fork, `Popen`, descriptors sent over a socket). Each read(2) holds the lock of the
position until the disk answers, and each lseek(2) waits for that lock. So the hub makes such calls itself
only where the description is surely ours:

    ========================  ==========================  ==================================
    the description           a read at its position      why
    ========================  ==========================  ==================================
    has a number that only    inline; a miss is a         no other call takes the lock or
    a file object knows       positional read             moves the position
    was opened by             inline; a miss is a         the program may have made a copy by
    `greenaio.os.open`        read(2) in a thread         means that Python does not see
    may be shared             a read(2) in a thread       the lock may be taken
    ========================  ==========================  ==================================

A number is recorded when greenaio opens it, and forgotten when it is closed, copied or passed on. A fork
forgets all numbers, in the parent and in the child, except a fork of `gevent.subprocess`: its child executes
another program, and numbers that are not inheritable end there.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from greenaio._core.bell import generation, listen

# Look at so many frames between the hook of a fork and the function of `gevent.subprocess` that forks.
FRAMES = 8

# The numbers that are surely ours, and whether only a file object knows the number. `_file` reads this dict,
# too.
ours: dict[int, bool] = {}
# Whether `greenaio.monkey` sees the calls that copy a number or pass it on.
_watches = False


def watch(watches: bool) -> None:
    """Note whether `share` is called from now on for each number that the program copies or passes on."""
    global _watches
    if not watches:
        ours.clear()
    _watches = watches


def is_ours(fd: int) -> bool:
    """Return whether no other process, thread or number can hold the lock of the position of *fd*."""
    # Notice a fork by C code, which ran no hook.
    generation()
    return fd in ours


def tell(fd: int) -> None:
    """Note that the program asks a file object for its number *fd*. Unless `watch` is on, forget the number,
    because the program may copy it unseen."""
    if ours.get(fd):
        if _watches:
            ours[fd] = False
        else:
            ours.pop(fd, None)


def share(value: Any) -> None:
    """Forget all numbers in *value*, an argument of a call that copies them or passes them on."""
    if isinstance(value, int):
        ours.pop(value, None)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            share(one)


def _after_fork_in_parent() -> None:
    """Forget all numbers, unless `gevent.subprocess` forks: its child executes another program."""
    frame: Any = sys._getframe(1) if ours else None
    for _ in range(FRAMES):
        if frame is None:
            break
        if frame.f_globals.get('__name__') == 'gevent.subprocess':
            return
        frame = frame.f_back
    ours.clear()


os.register_at_fork(after_in_parent=_after_fork_in_parent)
listen(ours.clear)
