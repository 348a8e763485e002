"""The turn: greenlets that use one file object, or one position of a file, do so one after the other."""

from __future__ import annotations

import contextlib
import errno
import sys
import weakref
from collections import deque
from collections.abc import Iterator

from gevent._fileobjectcommon import cancel_wait_ex
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.exceptions import BlockingSwitchOutError, InvalidThreadUseError
from gevent.hub import Hub
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

from greenaio._bell import generation, listen
from greenaio._ends import thrown
from greenaio._fallback import check_kept
from greenaio._uninterrupted import inside, thread_of

native_sleep = get_original('time', 'sleep')

ANOTHER_LOOK = 0.005            # seconds: how often who waits for another thread's greenlet looks


class Turn:
    """What one greenlet has at a time, first come, first served; and who has it may take it again.

    ``if turn.owner is None: turn.owner = me`` takes it, else `wait` says whether it is to be given back, with
    `leave`. (gevent's RLock does the same, at three times the price of what it protects.) There is no call
    between the look at `owner` and the assignment: another thread could have its turn there.

    If its owner can never leave, because its thread has ended, its hub was destroyed, or it stayed with
    the parent in a fork, the next takes it. Not if it *guards_io*: its objects have a lock of their own,
    which is held for ever then. But a greenlet that was given the turn and has not gone on since does not
    have it.
    """

    __slots__ = ('__weakref__', 'closers', 'finalizing', 'given', 'guards_io', 'owner', 'queue')

    def __init__(self, guards_io: bool = False) -> None:
        self.owner: greenlet | Gone | None = None
        self.given: _Waiter | None = None       # the owner, until it goes on
        self.queue: deque[_Waiter] = deque()
        self.closers: list[greenlet] = []       # others who had to wait meanwhile get EBADF
        self.finalizing = False     # nobody waits any more
        self.guards_io = guards_io
        _all_turns.add(weakref.ref(self, _all_turns.discard))   # a WeakSet takes ten times as long

    def wait(self) -> bool:
        """Wait until this greenlet has the turn; return False if it had it already. Raises OSError (EBADF)
        when it comes too late, because somebody closes what this is the turn of; or (EOWNERDEAD)."""
        generation()                    # the owner may have stayed with the parent
        me = getcurrent()
        if self.owner is me:
            return False
        if not can_wait():
            self._wait_natively(me)
            return True
        mine = _Waiter(me)
        self.queue.append(mine)
        try:
            while self.owner is not me:
                self._look_after_owner()
                if self._first() is mine and self.owner is None:
                    self.owner = me             # another thread left meanwhile
                    self.queue.popleft()
                else:
                    # The owner may be in another thread: then no loop tells us.
                    mine.event.wait(ANOTHER_LOOK)
            self.given = None
        except BaseException as error:  # killed, timed out
            self._give_up(mine)
            thrown(error)
            raise
        if self.closers and me not in self.closers:
            self.leave()
            raise thrown(cancel_wait_ex())
        return True

    def _look_after_owner(self) -> None:
        owner = self.owner
        if owner is None or not _is_gone(owner):
            return
        given = self.given
        if given is not None and given.greenlet is owner:
            given.is_out = True
        elif self.guards_io:
            raise OSError(errno.EOWNERDEAD, 'a thread or its hub ended while it used this file')
        if self.owner is owner:
            self.owner = None

    def _first(self) -> _Waiter | None:
        """The first of those who wait, without those who never go on."""
        with contextlib.suppress(IndexError):
            while _is_gone(self.queue[0].greenlet):
                self._take_out(self.queue[0])
            return self.queue[0]
        return None

    def _take_out(self, one: _Waiter) -> None:
        with contextlib.suppress(ValueError):       # another thread has done so
            self.queue.remove(one)
            one.is_out = True

    def _give_up(self, mine: _Waiter) -> None:
        me = mine.greenlet
        try:
            self.queue.remove(mine)
        except ValueError:
            while self.owner is not me and not mine.is_out:     # a thread that leaves gives it to us just now
                native_sleep(0)
        if self.owner is me:
            self.leave()

    def _wait_natively(self, me: greenlet) -> None:
        """In a thread without a hub: it is another thread's turn, and will pass. Who has it in this very
        thread cannot go on while we are here, as in a forked child before its hub runs: let it be."""
        here = thread_of(me)
        self._look_after_owner()
        while self.owner is not None and thread_of(self.owner) is not here:
            native_sleep(ANOTHER_LOOK / 50)
            self._look_after_owner()
        if self.owner is not None:
            self._refuse_if_stuck(me)
        self.owner = me

    def refuse_if_stuck(self) -> None:
        """Raise BlockingSwitchOutError where `wait` would, and wait for nothing."""
        me, owner = getcurrent(), self.owner
        if owner is not None and owner is not me and thread_of(owner) is thread_of(me):
            self._refuse_if_stuck(me)

    def _refuse_if_stuck(self, me: greenlet) -> None:
        """For *me*, which keeps the greenlet that has the turn from going on."""
        if get_hub_if_exists() is me:
            raise BlockingSwitchOutError('the hub can\'t wait for its turn with a file')
        if me in inside and not _is_fresh_child:
            raise BlockingSwitchOutError(
                'a parked greenlet is using the file, and can\'t go on inside greenaio.uninterrupted()')

    def leave(self) -> None:
        """Give the turn to the next; for who has it."""
        self.given = None
        while self.queue and self._first() is not None:
            try:
                one = self.queue.popleft()
            except IndexError:          # it has given up, in another thread
                break
            self.given = one            # first: other threads look after the owner
            self.owner = one.greenlet
            # Its hub may just be destroyed. Then the next that waits finds out.
            with contextlib.suppress(InvalidThreadUseError, ValueError):
                one.event.set()
            return
        self.owner = None


class _Waiter:
    """A greenlet in the queue of a turn."""

    __slots__ = ('event', 'greenlet', 'is_out')

    def __init__(self, one: greenlet) -> None:
        self.greenlet = one
        self.event = Event()
        self.is_out = False             # another has taken it out of the queue, or its turn away


class Gone:
    """As owner of a turn: one of a thread that stayed with the parent in a fork."""

    dead = True
    parent = None


def _is_gone(one: greenlet | Gone) -> bool:
    """Whether it never goes on: its thread has ended, or its hub was destroyed."""
    return one.dead or isinstance(one.parent, Hub) and one.parent.loop is None


_all_turns: set[weakref.ref[Turn]] = set()
_is_fresh_child = False


def can_wait() -> bool:
    """Whether the caller is a greenlet whose hub can serve others while it waits.

    Not inside `uninterrupted`. Not in a forked child before its hub has run for another reason: between fork
    and exec, as in `gevent.subprocess`, it would run the parent's greenlets there.
    """
    if _is_fresh_child or sys.is_finalizing():
        return False
    hub = get_hub_if_exists()
    if hub is None:
        return False
    me = getcurrent()
    return me is not hub and not (inside and me in inside)


def _after_fork_in_child() -> None:
    global _is_fresh_child
    here = thread_of(getcurrent())
    for ref in list(_all_turns):
        turn = ref()
        if turn is None:
            continue
        if turn.owner is not None and thread_of(turn.owner) is not here:
            turn.owner = None if turn.given is not None and turn.given.greenlet is turn.owner else Gone()
            turn.given = None
        turn.queue = deque(waiter for waiter in turn.queue if thread_of(waiter.greenlet) is here)
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None:
        _is_fresh_child = True
        hub.loop.run_callback(_hub_runs)


def _hub_runs() -> None:
    global _is_fresh_child
    _is_fresh_child = False


listen(_after_fork_in_child)

turns: dict[int, Turn] = {}             # by fd; a number that was used once will be used again


@contextlib.contextmanager
def taking(turn: Turn, fd: int = -1) -> Iterator[None]:
    """One greenlet at a time; its owner may take the turn again. Raises EBADF if a forked child has closed
    *fd* while a copy of this greenlet waited there."""
    me = getcurrent()
    mine, forks = True, None
    if turn.owner is None:
        turn.owner = me
    else:
        forks = generation()
        mine = turn.wait()
    try:
        if forks is not None:
            check_kept(fd, forks)
        yield
    finally:
        if mine and turn.owner is me:
            turn.leave()


def turn_of(fd: int) -> contextlib.AbstractContextManager[None]:
    """One greenlet at a time, for each fd."""
    return taking(turns.get(fd) or turns.setdefault(fd, Turn()), fd)
