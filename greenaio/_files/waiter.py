"""Waiters for a turn: which greenlet waits for which owner, and whether that owner can ever leave.

`turn` has the order in which they come.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any, Protocol

from gevent._hub_local import get_hub_if_exists
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import Hub
from greenlet import getcurrent, greenlet

from greenaio._core.bell import listen
from greenaio._core.ends import before_end
from greenaio._core.uninterrupted import inside, thread_of
from greenaio._files.sleeper import NativeSleeper, Sleeper


class Mark:
    """A mark in `Turn.owner` instead of a greenlet that could go on."""

    parent = None

    def __init__(self, dead: bool) -> None:
        self.dead = dead


LEFT, GONE = Mark(False), Mark(True)


class AnyTurn(Protocol):
    """The part of a `Turn` that its waiters use."""

    owner: greenlet | Mark | None
    queue: list[Waiter]
    thread: Any
    is_mixed: bool

    def wake_next(self) -> None: ...


class Waiter:
    """A greenlet in the queue of a turn."""

    __slots__ = ('greenlet', 'is_native', 'outer', 'sleeper', 'thread', 'turn', 'vain')

    def __init__(self, turn: AnyTurn, one: greenlet) -> None:
        self.turn, self.greenlet, self.thread = turn, one, thread_of(one)
        self.is_native = not can_wait()
        self.sleeper: Sleeper | NativeSleeper = NativeSleeper() if self.is_native else Sleeper()
        # The number of wakes after which this waiter did not get the turn.
        self.vain = 0
        # The waiter of the same greenlet below a signal handler.
        self.outer: Waiter | None = None

    def come(self) -> None:
        """Enter the queue."""
        turn, owner = self.turn, self.turn.owner
        self.outer = _waiters.get(self.greenlet)
        _waiters[self.greenlet] = self
        if self.is_native:
            _blocked[self.thread] = self
        turn.queue.append(self)
        thread = turn.thread if owner is LEFT or owner is None else thread_of(owner)
        if thread is not self.thread or turn.queue[0].thread is not self.thread:
            turn.is_mixed = True

    def wait(self) -> None:
        self.sleeper.wait()
        self.vain += 1

    def go(self) -> None:
        """Leave the queue, and wake the next waiter. May be called twice, because an exception may interrupt
        it."""
        if _waiters.get(self.greenlet) is self:
            if self.outer is None:
                _waiters.pop(self.greenlet, None)
            else:
                _waiters[self.greenlet] = self.outer
        if self.is_native:
            _blocked.pop(self.thread, None)
        with contextlib.suppress(ValueError):
            self.turn.queue.remove(self)
        self.turn.wake_next()

    def waits_for_ever(self) -> bool:
        """Return whether the owner waits for a turn that this greenlet has, or that a greenlet has whose
        thread this one blocks, directly or through other waiters."""
        owner = self.turn.owner
        for _ in range(len(_waiters)):
            if not isinstance(owner, greenlet):
                return False
            other = _waiters.get(owner) or _blocked.get(thread_of(owner))
            if other is None or not other.sleeper.is_parked:
                return False
            owner = other.turn.owner
            if owner is self.greenlet or self.is_native and self._blocks(owner):
                return True
        return False

    def _blocks(self, owner: greenlet | Mark | None) -> bool:
        return owner is not None and thread_of(owner) is self.thread


def is_gone(one: greenlet | Mark) -> bool:
    """Return whether *one* never goes on, because its thread has ended or its hub was destroyed."""
    if one.dead:
        return True
    hub: Any = one.parent
    if not isinstance(hub, Hub):
        return False
    end = hub.__dict__.get('_greenaio_turns')
    return hub.loop is None or end is not None and end.is_over


def refuse_if_stuck(me: greenlet) -> None:
    """Raise BlockingSwitchOutError if *me* keeps the greenlet that has the turn from going on."""
    if get_hub_if_exists() is me:
        raise BlockingSwitchOutError('the hub can\'t wait for its turn with a file')
    if me in inside and not _is_fresh_child:
        raise BlockingSwitchOutError(
            'a parked greenlet is using the file, and can\'t go on inside greenaio.uninterrupted()')


# The waiters of all threads. For a greenlet with waiters below signal handlers this is the newest.
_waiters: dict[greenlet, Waiter] = {}
# By thread: the waiter that keeps the whole thread.
_blocked: dict[Any, Waiter] = {}
# The hub for which `attend` was called last.
attended: Any = None
_is_fresh_child = False


class _End:
    """The end of a hub that is destroyed, or whose thread ends. It takes the hub's waiters out of their
    queues, because its greenlets never go on."""

    def __init__(self, hub: Any) -> None:
        self._hub = weakref.ref(hub)
        self.is_over = False

    def __call__(self) -> None:
        global attended
        # From here on, new waiters see it themselves.
        self.is_over = True
        hub = self._hub()
        if hub is attended:
            attended = None
        for waiter in all_waiters():
            if isinstance(waiter.sleeper, Sleeper) and waiter.sleeper.hub is hub:
                waiter.go()
        let_others_look()


def let_others_look() -> None:
    """Wake the waiters of turns whose owners are gone."""
    for waiter in all_waiters():
        owner = waiter.turn.owner
        if owner is None or owner is LEFT or is_gone(owner):
            waiter.sleeper.wake()


def all_waiters() -> list[Waiter]:
    found: list[Waiter] = []
    # Copy the values in one step, because other threads add and remove waiters.
    for waiter in list(_waiters.values()):
        inner: Waiter | None = waiter
        while inner is not None:
            found.append(inner)
            inner = inner.outer
    return found


def attend(hub: Any) -> None:
    """Ask to be told of the end of *hub*, the hub of this thread, before a greenlet of the hub parks in its
    turn."""
    global attended
    if hub is not None and '_greenaio_turns' not in hub.__dict__:
        hub._greenaio_turns = end = _End(hub)
        before_end(hub, end)
    attended = hub


def can_wait() -> bool:
    """Return whether the caller is a greenlet whose hub can serve others while it waits.

    The answer is no inside `uninterrupted`. It is also no in a forked child until its hub has run for another
    reason: between fork and exec, as in `gevent.subprocess`, the hub would run the parent's greenlets there.
    """
    if _is_fresh_child or sys.is_finalizing():
        return False
    hub: Any = get_hub_if_exists()
    if hub is None:
        return False
    if hub is not attended:
        attend(hub)
    me = getcurrent()
    return me is not hub and not (inside and me in inside)


def _after_fork_in_child() -> None:
    """Forget the waiters of the threads that stayed with the parent."""
    global _is_fresh_child
    here = thread_of(getcurrent())
    for waiter in all_waiters():
        if waiter.thread is not here:
            _waiters.pop(waiter.greenlet, None)
    _blocked.clear()
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None:
        _is_fresh_child = True
        hub.loop.run_callback(_hub_runs)


def _hub_runs() -> None:
    global _is_fresh_child
    _is_fresh_child = False


listen(_after_fork_in_child)
