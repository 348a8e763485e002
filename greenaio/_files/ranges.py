"""Ranges of a file: greenlets hold the bytes that they change, and no two ranges that are held overlap.

A misaligned write, see `sectors`, and a fallocate first hold a range of the file. While a range of a file is
held or waited for, its other writes hold ranges too: the aligned ones, those through the page cache, copies
into the file, and calls that change its length, such as an open with O_TRUNC. Calls that block hold none: in
the hub, in a thread without a hub, in another process.

The ranges of a file are in one list of its `Inode`, in the order in which they were asked for. A range is
granted once no earlier one overlaps it. Until then it hangs on the newest earlier range that overlaps it.
When that one goes, granted or not, the range looks on from there for the next. So giving a range back costs
a look at its followers, not at all ranges that wait. Each range waits for earlier ones only, so no two wait
for each other.

A write may outlive the greenlet that asked for it: the kernel, or a thread, still has it when the greenlet is
killed or its hub is gone. So a range that is given back stays in the list until its writes are over. The
writes that were under way before the first range was asked for are the same case: together they have a range
of the whole file. It is the oldest, no greenlet holds it, and it goes with the last of them.

    one                         the kernel              two
    holds a range, writes
                                has the write
    is killed: gives it back,
    which changes nothing
                                                        asks for the range: hangs
                                is done: the range goes
                                                        is granted

The parties:

- A greenlet waits for its range itself, and leaves nothing if it is killed then. Once it has the range, a
  greenlet of its own does the work and gives the range back, even if the one that asked is killed.
- Another thread that gives a range back, or lets go of its last write, wakes the waiter by the loop of the
  waiter's own hub. `_lock` guards the lists. No greenlet switches while it is held.
- A write that holds no range does not take the lock. It looks whether the file has ranges, and counts, in
  one step. The greenlet that asks for the first range puts it in the list, and then looks at the count. So
  one of the two sees the other.
- A thread that ends, or whose hub is destroyed, gives its ranges back.
- A forked child drops the ranges of the threads that stayed with the parent, and waits for no write of the
  parent's. The parent keeps its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gevent import get_hub
from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original

from greenaio._core.bell import generation, listen
from greenaio._core.ends import before_end, thrown
from greenaio._core.handle import Inode, Writes, all_inodes, using
from greenaio._files import loop as _loop
from greenaio._files.sleeper import Sleeper

# The end of the range of a write that makes the file longer, in bytes.
EVERYTHING = 1 << 63

get_ident = get_original('_thread', 'get_ident')
# The lock is recursive, because a finalizer may run in a thread that holds it and give back a range, too.
_make_lock = get_original('_thread', 'RLock')


class _Ranges:
    """The ranges of one file, from the oldest to the newest."""

    def __init__(self) -> None:
        self.newest: Range | None = None
        self.count = 0
        # All ranges that were ever in the list lie between these two offsets, except `before`.
        self.low, self.high = EVERYTHING, 0
        # The range of the writes that hold none.
        self.before: Range | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Range]:
        one = self.newest
        while one is not None:
            yield one
            one = one.older

    def _check(self) -> None:
        """Assert what must hold whenever the lock is free."""
        ranges = list(self)[::-1]
        assert len(ranges) == self.count
        assert self.before is None or self.before is ranges[0]
        for i, one in enumerate(ranges):
            earlier = [other for other in ranges[:i] if other.overlaps(one)]
            assert one.granted == (not earlier)
            assert one.blocker is (earlier[-1] if earlier else None)
            assert not earlier or one in earlier[-1].followers()
            assert one.writes.count or not one.is_left, 'a range that is kept for nothing'


_lock = _make_lock()


def held() -> list[Inode]:
    """Return the inodes that have a range which is held or waited for."""
    return [inode for inode in all_inodes() if inode.ranges is not None]


def refuse_if_held(inode: Inode | None, start: int = 0, end: int = EVERYTHING) -> None:
    """Raise BlockingSwitchOutError if a write holds any byte from *start* to *end*."""
    generation()
    if inode is None:
        return
    with _lock:
        is_held = any(other.start < end and start < other.end for other in inode.ranges or ())
    if is_held:
        raise BlockingSwitchOutError(
            'a parked greenlet is changing these sectors, and can\'t go on inside greenaio.uninterrupted()')


class _Thread:
    """The ranges of one native thread, and the numbers that its greenlets keep taken.

    If the thread ends or its hub is destroyed, `give_back` gives back all of them, because the greenlets
    can't."""

    def __init__(self) -> None:
        self.ident = get_ident()
        self.ranges: set[Range] = set()
        self.stays: set[contextlib.ExitStack] = set()

    def give_back(self) -> None:
        """Give back all that the greenlets of the thread have."""
        _threads.discard(self)
        for stays in list(self.stays):
            stays.close()
        for one in list(self.ranges):
            one.let_go()


_local = get_original('_thread', '_local')()
_threads: set[_Thread] = set()


def _this_thread() -> _Thread:
    """Return the `_Thread` of the caller, and make sure that it hears of the end of the caller's hub."""
    mine: _Thread | None = getattr(_local, 'ranges', None)
    if mine is None:
        mine = _local.ranges = _Thread()
    hub: Any = get_hub()
    if '_greenaio_ranges' not in hub.__dict__:
        hub._greenaio_ranges = True
        before_end(hub, mine.give_back)
        _threads.add(mine)
    return mine


def staying(fd: int) -> contextlib.ExitStack:
    """Keep the number *fd* on the same file until the result is closed, by its greenlet or at the end of the
    thread."""
    stays, thread = contextlib.ExitStack(), _this_thread()
    # A negative fd means that the file is being opened, and has no number so far.
    if fd >= 0:
        stays.enter_context(using(fd))
    thread.stays.add(stays)
    stays.callback(thread.stays.discard, stays)
    return stays


class Range:
    """The bytes from *start* to *end* of *inode*, which are held or waited for until `let_go`.

    Its writes count in `writes`. The ranges that hang on this one are a list through `next` and `previous`,
    so that giving it back needs no memory.
    """

    ranges: _Ranges
    thread: _Thread | None
    sleeper: Sleeper | None             # of the waiting greenlet
    older: Range | None
    newer: Range | None
    blocker: Range | None
    # The first of the ranges that hang on this one.
    first: Range | None
    next: Range | None
    previous: Range | None

    def __init__(self, inode: Inode, start: int, end: int) -> None:
        self._begin(inode, start, end, Writes())
        self.thread = thread = _this_thread()
        before: Range | None = None
        # Notice a fork by C code. Its child must not wait for a lock that a thread of the parent held.
        generation()
        with _lock:
            ranges: _Ranges = _Ranges() if inode.ranges is None else inode.ranges
            if inode.ranges is None:
                before = Range.__new__(Range)
                before._begin(inode, 0, EVERYTHING, inode.writes)
            count = ranges.count + (1 if before is None else 2)
            low, high = min(start, ranges.low), max(end, ranges.high)
            thread.ranges.add(self)
            # From here on nothing needs memory.
            if before is not None:
                before.ranges, ranges.newest, ranges.before = ranges, before, before
                inode.ranges = ranges
            self.ranges, self.older = ranges, ranges.newest
            if self.older is not None:
                self.older.newer = self
            ranges.newest, ranges.count = self, count
            if start < ranges.high and ranges.low < end:
                self._hang(self.older)
            else:
                # The range overlaps no range that is held or waited for.
                self._hang(ranges.before)
            ranges.low, ranges.high = low, high
        if before is not None:
            # The range `before` stays in the list until the writes that hold no range are over.
            before.let_go()

    def _begin(self, inode: Inode, start: int, end: int, writes: Writes) -> None:
        self.inode, self.start, self.end, self.writes = inode, start, end, writes
        # `is_left`: the holder has given the range back. `over`: the range is out of the list.
        self.is_left = self.over = False
        self.thread = self.sleeper = None
        self.older = self.newer = self.blocker = self.first = self.next = self.previous = None

    def followers(self) -> Iterator[Range]:
        """Yield the ranges that hang on this one."""
        one = self.first
        while one is not None:
            yield one
            one = one.next

    @property
    def granted(self) -> bool:
        return self.blocker is None

    def overlaps(self, other: Range) -> bool:
        return self.start < other.end and other.start < self.end

    def _hang(self, other: Range | None) -> None:
        """Hang on the newest range that overlaps, which is *other* or one before it. If there is none, the
        range is granted. The caller has the lock."""
        while other is not None and not (other.start < self.end and self.start < other.end):
            other = other.older
        self.blocker, self.previous, self.next = other, None, None
        if other is not None:
            self.next = other.first
            if other.first is not None:
                other.first.previous = self
            other.first = self

    def _unhang(self) -> None:
        """Stop hanging on the blocker. The caller has the lock."""
        if self.previous is not None:
            self.previous.next = self.next
        elif self.blocker is not None:
            self.blocker.first = self.next
        if self.next is not None:
            self.next.previous = self.previous

    def wait(self) -> None:
        """Wait until the range is granted."""
        self.sleeper = Sleeper()
        # The sleeper exists before this look. So a grant by another thread is either seen here or wakes the
        # sleeper.
        while not self.granted:
            self.sleeper.wait()

    def let_go(self) -> None:
        """Give the range back, granted or not. It goes when its writes are over. A second call does nothing.
        Any thread may call this."""
        granted: Range | None = None
        generation()
        with _lock:
            if self.over:
                return
            self.is_left = True
            # Set this before the look at the count, because the last write may end in another thread at this
            # moment.
            self.writes.at_end = self.let_go
            if self.writes.count:
                return
            self.writes.at_end = None
            self.over = True
            if self.thread is not None:
                self.thread.ranges.discard(self)
            self._unlink()
            self._unhang()
            one, self.first = self.first, None
            while one is not None:
                following = one.next
                # No range between the two overlaps it.
                one._hang(self.older)
                if one.granted:
                    one.next, granted = granted, one
                one = following
        while granted is not None:
            one, granted = granted, granted.next
            one.next = None
            one._wake()

    def _unlink(self) -> None:
        """Take the range out of the list of the inode. The caller has the lock."""
        if self.newer is not None:
            self.newer.older = self.older
        else:
            self.ranges.newest = self.older
        if self.older is not None:
            self.older.newer = self.newer
        self.ranges.count -= 1
        if self.ranges.before is self:
            self.ranges.before = None
        if self.ranges.newest is None:
            self.inode.ranges = None

    def _wake(self) -> None:
        """Wake the greenlet that waits for the range, if it has begun to wait."""
        if self.sleeper is None:
            # The greenlet has not begun to wait, and looks before it does.
            return
        try:
            self.sleeper.wake()
        except MemoryError:
            # Try again, because nothing else will wake the greenlet.
            self.sleeper.wake()

    def forget_writes(self) -> None:
        """Forget the writes of the parent in a forked child, because they never end there."""
        self.writes = Writes() if self.thread is not None else self.inode.writes


def hold(fd: int, inode: Inode, start: int, end: int) -> Range:
    """Wait for the range from *start* to *end* (bytes) of the file *fd*, and return it held. It comes after
    all earlier ranges that overlap it, and after the writes that were under way when the first of them was
    asked for.

    Raise OSError (EBADF) in a forked child that has closed *fd* during the wait.
    """
    mine, forks = Range(inode, start, end), generation()
    try:
        with staying(fd):
            if not mine.granted:
                mine.wait()
            _loop.check_kept(fd, forks)
    except BaseException as error:
        mine.let_go()
        thrown(error)
        raise
    return mine


def _after_fork_in_child() -> None:
    """Drop the ranges of the threads that stayed with the parent, and the writes of the parent."""
    global _lock
    # Another thread of the parent may have held the old lock.
    _lock = _make_lock()
    left = [one for inode in held() for one in inode.ranges]
    for one in left:
        one.forget_writes()
    for thread in list(_threads):
        # A thread with another ident stayed with the parent.
        if thread.ident != get_ident():
            thread.give_back()
    for one in left:
        if one.is_left or one.thread is None or one.thread.ident != get_ident():
            one.let_go()


listen(_after_fork_in_child)
