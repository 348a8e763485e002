"""The turn: greenlets that use one file object, or one position of a file, do so one after the other.

The uncontended turn is one comparison and one assignment, so callers take it and give it back themselves::

    me, owner = getcurrent(), turn.owner
    if owner is None:
        turn.owner = me
    elif owner is me:
        return work()                   # it has the turn already, and keeps it
    try:
        if owner is not None:
            turn.wait()
        return work()
    finally:
        if turn.owner is me:            # a forked child may have taken it
            if not turn.queue:
                turn.owner = None
            else:
                try:
                    turn.leave()
                finally:
                    if turn.owner is me:
                        turn.leave()

There is no call between a look and the assignment that depends on it. Another thread, or a signal handler,
could use the turn there. An exception that a signal handler raises at any call leaves the turn to the next.

The owner of a turn is always one of these:

    ==============  ======================================================================================
    None            the turn is free, and no greenlet waits
    a greenlet      it is inside, running or parked
    `LEFT`          the `leaver` has left, and greenlets wait: the next of them is woken, and takes the turn
    `GONE`          it was inside in another thread when the process forked: see below
    ==============  ======================================================================================

No greenlet is given the turn. It is woken, looks, and takes the turn or waits on, at its place in the queue.
Greenlets have the turn in the order in which they asked for it. A library that compresses, such as `gzip`,
relies on that: bytes that it has compressed first must be written first. The turn of a text file *favours its
leaver* instead:

    the leaver                              the first of the queue, in the same thread
    -------------------------------------   ---------------------------------------------
    LEFT; its hub will wake the first
    wants the turn again: it has not
    parked, so it goes on
    LEFT; its hub will wake the first
    parks
                                            woken: takes the turn

So the pieces of a line that `print` writes stay together. A greenlet that has just come waits behind the
queue. One that parks only inside its turn would come first for ever: the first of the queue waits no more
once it was woken `VAIN_MAX` times in vain.

A waiter of another thread need not wait until the leaver parks, because the leaver may be about to join that
thread without its hub. So with waiters of several threads the first of each is woken. Of these, the first of
the queue takes the turn, or, if that one is of the leaver's own thread, whichever of the others comes first.
The leaver waits behind them.

A thread without a hub, a hub, and a greenlet inside `uninterrupted` keep their whole thread waiting. They go
before the waiters of their own thread, and are refused if the owner is a greenlet of that thread.

Some owners can never leave, because their thread ended, their hub was destroyed, or they stayed with the
parent in a fork. Then the next takes the turn. Not if the turn *guards_io*: the objects of `io` have locks of
their own, which are held for ever then, so a greenlet that wants the turn gets EOWNERDEAD. Waiters that can
never go on are taken out of the queue.

A signal handler runs on top of a greenlet, which may be inside a turn, or may be waiting for one. A waiter
below a handler that waits for something else is passed over until it is back. If the owner waits for a
turn that the caller has, directly or through other waiters, waiting would never end: `wait` raises
RuntimeError, as `io` does for reentrant calls.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from gevent._fileobjectcommon import cancel_wait_ex
from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent, greenlet

from greenaio._core.bell import generation, listen
from greenaio._core.ends import thrown
from greenaio._core.uninterrupted import thread_of
from greenaio._files import waiter as _waiting
from greenaio._files.loop import check_kept
from greenaio._files.waiter import GONE, LEFT, Mark, Waiter, is_gone, let_others_look, refuse_if_stuck

# So often may the first in the queue be woken in vain, because the leaver has taken the turn again.
VAIN_MAX = 16


class Turn:
    """A turn, which belongs to one greenlet at a time, first come, first served. The module says how to take
    it.

    If the turn favours its leaver, a greenlet that has left it and not parked since comes first.

    Closers are greenlets that wait to close what the turn protects. Others that had to wait get EBADF then.
    """

    __slots__ = ('__weakref__', 'closers', 'favours_leaver', 'finalizing', 'guards_io', 'is_mixed', 'leaver',
                 'owner', 'queue', 'thread')

    def __init__(self, guards_io: bool = False) -> None:
        self.owner: greenlet | Mark | None = None
        # Other threads may change the list during a loop over it.
        self.queue: list[Waiter] = []
        # The greenlet that last left the turn while others waited, and its thread.
        self.leaver: greenlet | None = None
        self.thread: Any = None
        # Whether a waiter may be of another thread than the owner or the leaver.
        self.is_mixed = False
        self.closers: list[greenlet] = []
        # Set when the file is finalized or the interpreter ends. No greenlet waits after that.
        self.finalizing = False
        self.favours_leaver = False
        self.guards_io = guards_io
        # A set of weak references, because a WeakSet takes ten times as long.
        _all_turns.add(weakref.ref(self, _all_turns.discard))

    def wait(self) -> bool:
        """Wait until this greenlet has the turn. Return False if it had the turn already.

        Raise OSError: EBADF if another greenlet closes the file that the turn protects, EOWNERDEAD if the
        owner of a turn that guards `io` can never leave. Raise RuntimeError if the wait would never end."""
        # Notice a fork by C code, because the owner may have stayed with the parent.
        generation()
        me = getcurrent()
        if self.owner is me:
            return False
        if not self._go_on(me):
            self._stand_in_line(me)
        if self.closers and me not in self.closers:
            self.leave()
            raise thrown(cancel_wait_ex())
        return True

    def _go_on(self, me: greenlet) -> bool:
        """Take the turn again if it favours its leaver, which is this greenlet, and no other greenlet must
        come first. Return whether this greenlet has the turn."""
        if self.favours_leaver and self.leaver is me and not self.is_mixed:
            first = self._first(None)
            if (first is None or first.vain < VAIN_MAX) and self.owner is LEFT:
                self.owner, self.leaver, self.thread = me, None, None
        return self.owner is me

    def _stand_in_line(self, me: greenlet) -> None:
        """Wait in the queue until *me* has the turn. After an error *me* is neither in the queue nor the
        owner."""
        mine = Waiter(self, me)
        try:
            mine.come()
            while not self._take(mine):
                mine.wait()
            mine.go()
        except BaseException as error:
            # The greenlet was killed or timed out, or a signal handler raised this.
            try:
                mine.go()
            except BaseException:
                # Another signal handler raised this.
                mine.go()
                raise
            if self.owner is me:
                self.leave()
            thrown(error)
            raise

    def _take(self, mine: Waiter) -> bool:
        """Take the turn if *mine* may have it. Return whether its greenlet has the turn. Raise the error that
        ends the wait."""
        me, owner = mine.greenlet, self.owner
        if owner is not None and owner is not LEFT and owner is not me:
            self._look_after_owner(mine)
        if self.owner is None:
            self.owner = me
        elif self.owner is LEFT and self._is_next(mine) and self.owner is LEFT:
            self.owner, self.leaver, self.thread = me, None, None
        return self.owner is me

    def _look_after_owner(self, mine: Waiter) -> None:
        """Let *mine* wait only for an owner that will leave."""
        owner = self.owner
        if owner is None or owner is LEFT:
            return
        if is_gone(owner):
            self._pass_over(owner)
        elif mine.is_native and thread_of(owner) is mine.thread:
            # The owner cannot go on while this greenlet keeps the thread, as in a forked child before its hub
            # runs. So take the turn from it.
            refuse_if_stuck(mine.greenlet)
            self.owner = mine.greenlet
        elif sys.is_finalizing():
            # While the interpreter ends, other threads do not go on.
            self._pass_over(owner)
        elif not mine.vain and mine.waits_for_ever():
            raise RuntimeError('reentrant call: the owner of the turn with this file waits for another file, '
                               'whose turn this greenlet has')

    def _pass_over(self, owner: greenlet | Mark) -> None:
        """Let the turn go on without *owner*, which never leaves it."""
        if self.guards_io:
            other = self._first(None)
            if other is not None:
                # The next waiter finds the same owner, and raises the same error.
                other.sleeper.wake()
            raise OSError(errno.EOWNERDEAD, 'a thread or its hub ended while it used this file')
        if self.owner is owner:
            self.owner = LEFT
            self.wake_next()

    def _is_next(self, mine: Waiter) -> bool:
        """Return whether *mine* may take the turn, which its owner has left."""
        first = self._first(mine)
        if first is mine or first is None or sys.is_finalizing():
            return True
        if first.thread is mine.thread:
            return mine.is_native
        return first.thread is self.thread

    def _first(self, mine: Waiter | None) -> Waiter | None:
        """Return the first in the queue that could take the turn at once: *mine*, or a waiter that is parked.
        None if there is none."""
        for one in self.queue:
            if one is mine or one.sleeper.is_parked:
                return one
        return None

    def refuse_if_stuck(self) -> None:
        """Raise BlockingSwitchOutError if `wait` would, but wait for nothing."""
        me, owner = getcurrent(), self.owner
        if isinstance(owner, greenlet) and owner is not me and thread_of(owner) is thread_of(me):
            refuse_if_stuck(me)

    def stay_in_child(self, here: Any) -> None:
        """Forget, in a forked child, the owner and the waiters of all threads except *here*, because those
        threads stayed with the parent."""
        if isinstance(self.owner, greenlet) and thread_of(self.owner) is not here:
            self.owner = GONE
        self.queue = [waiter for waiter in self.queue if waiter.thread is here]
        self.wake_next()

    def leave(self) -> None:
        """Give the turn to the next waiter. Its owner calls this."""
        if not self.queue:
            self.owner = None
            return
        me = getcurrent()
        self.thread = thread_of(me)
        self.leaver = me
        self.owner = LEFT
        try:
            self.wake_next()
        except BaseException:
            # A signal handler raised this, and perhaps no waiter was woken.
            self.wake_next()
            raise

    def wake_next(self) -> None:
        """Wake the first in the queue, if the owner has left; with waiters of several threads, the first of
        each thread.

        Also wake the waiters before it that are not parked. They look at the turn by themselves, but may be
        about to park."""
        if self.owner is not LEFT:
            return
        if self.is_mixed:
            self._wake_threads()
        else:
            for one in self.queue:
                one.sleeper.wake()
                if one.sleeper.is_parked:
                    break
        if not self.queue and self.owner is LEFT:
            self.owner = self.leaver = self.thread = None

    def _wake_threads(self) -> None:
        """Wake the first parked waiter of each thread, and each waiter that keeps a whole thread."""
        # A waiter of another thread that comes from now on sets this again.
        self.is_mixed = False
        woken = set()
        for one in self.queue:
            if one.thread is not self.thread:
                self.is_mixed = True
            if one.thread not in woken or one.is_native:
                one.sleeper.wake()
                if one.sleeper.is_parked:
                    woken.add(one.thread)


_all_turns: set[weakref.ref[Turn]] = set()


def _after_fork_in_child() -> None:
    """Forget the owners and waiters that stayed with the parent, in each turn."""
    here = thread_of(getcurrent())
    for ref in list(_all_turns):
        turn = ref()
        if turn is not None:
            turn.stay_in_child(here)
    let_others_look()


listen(_after_fork_in_child)

# By fd. An entry stays after the close, because a number that was used once will be used again.
turns: dict[int, Turn] = {}


@contextlib.contextmanager
def taking(turn: Turn, fd: int = -1) -> Iterator[None]:
    """Hold *turn* inside the ``with`` block. Its owner may enter again. Raise OSError (EBADF) if this is a
    forked child that has closed *fd* while the copy of the greenlet waited."""
    hub = get_hub_if_exists()
    if hub is not _waiting.attended:
        _waiting.attend(hub)
    me, owner = getcurrent(), turn.owner
    if owner is None:
        turn.owner = me
    elif owner is me:
        yield
        return
    try:
        if owner is not None:
            forks = generation()
            turn.wait()
            check_kept(fd, forks)
        yield
    finally:
        if turn.owner is me:
            if not turn.queue:
                turn.owner = None
            else:
                try:
                    turn.leave()
                finally:
                    if turn.owner is me:
                        turn.leave()


def turn_of(fd: int) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that holds the turn of the position of *fd*."""
    return taking(turns.get(fd) or turns.setdefault(fd, Turn()), fd)
