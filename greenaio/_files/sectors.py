"""Misaligned O_DIRECT writes: read, modify, write, with no other write in the same sectors in between.

Two neighbours in one sector would lose each other's bytes:

    one                     two                     the sector
    reads it: aa aa
                            reads it: aa aa
    writes: 11 aa                                   11 aa
                            writes: aa 22           aa 22: the bytes of one are lost

So a misaligned write, and a fallocate, first holds a range of the file. While a range of a file is held or
waited for, its other writes hold ranges too: the aligned ones, those through the page cache, copies into the
file, and calls that change its length, such as an open with O_TRUNC. Calls that block hold none: in the hub,
in a thread without a hub, in another process.

The ranges of a file are in one list, in the order in which they were asked for. A range is granted once no
earlier one overlaps it. Until then it hangs on the newest earlier range that overlaps it; when that one goes,
granted or not, it looks for the next. So giving a range back costs a look at its followers, not at all that
wait. Each range waits for earlier ones only, so no two wait for each other. The parties:

- A greenlet waits for its range itself, and leaves nothing if it is killed then. Once it has the range, a
  greenlet of its own does the work and gives the range back, even if the one that asked is killed.
- Another thread that gives a range back wakes the waiter by the loop of the waiter's own hub. `_lock` guards
  the lists. No greenlet switches while it is held.
- A thread that ends, or whose hub is destroyed, gives its ranges back. Its writes in flight are waited for,
  like those that were under way before any range was asked for: see `hold`.
- A forked child drops the ranges of the threads that stayed with the parent. The parent keeps its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original

from greenaio._core.bell import generation, listen
from greenaio._core.ends import before_end, thrown
from greenaio._core.handle import using
from greenaio._files import portable as _fallback

Inode = tuple[int, int]         # device, inode
EVERYTHING = 1 << 63            # the end of a range that makes the file longer
ANOTHER_LOOK = 60.0             # seconds: this timer keeps the loop running, for another thread to wake us
SETTLING = 0.001                # seconds between looks at writes that took no turn, which are rare

get_ident = get_original('_thread', 'get_ident')
_make_lock = get_original('_thread', 'RLock')   # a finalizer of the same thread may come here, too


class _Ranges:
    """The ranges of one file, from the oldest to the newest."""

    def __init__(self) -> None:
        self.newest: _Range | None = None
        self.count = 0
        self.low, self.high = EVERYTHING, 0     # where all that were in it begin and end
        self.settled = False            # no write that took no turn is under way any more

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[_Range]:
        one = self.newest
        while one is not None:
            yield one
            one = one.older

    def _check(self) -> None:
        """Assert what must hold whenever the lock is free."""
        ranges = list(self)[::-1]
        assert len(ranges) == self.count
        for i, one in enumerate(ranges):
            earlier = [other for other in ranges[:i] if other.overlaps(one)]
            assert one.granted == (not earlier)
            assert one.blocker is (earlier[-1] if earlier else None)
            assert not earlier or one in earlier[-1].followers()


_held: dict[Inode, _Ranges] = {}
_lock = _make_lock()


def refuse_if_held(inode: Inode, start: int = 0, end: int = EVERYTHING) -> None:
    """Raise BlockingSwitchOutError if a write holds any byte from *start* to *end*."""
    generation()
    with _lock:
        is_held = any(other.start < end and start < other.end for other in _held.get(inode, ()))
    if is_held:
        raise BlockingSwitchOutError(
            'a parked greenlet is changing these sectors, and can\'t go on inside greenaio.uninterrupted()')


class _Thread:
    """The ranges of one native thread, and what else its greenlets would give back."""

    def __init__(self) -> None:
        self.ident = get_ident()
        self.ranges: set[_Range] = set()
        self.stays: set[contextlib.ExitStack] = set()

    def give_back(self) -> None:
        _threads.discard(self)
        for stays in list(self.stays):
            stays.close()
        for one in list(self.ranges):
            one.ranges.settled = False  # a write of this range may be in flight
            one.let_go()


_local = get_original('_thread', '_local')()
_threads: set[_Thread] = set()


def _this_thread() -> _Thread:
    mine: _Thread | None = getattr(_local, 'ranges', None)
    if mine is None:
        mine = _local.ranges = _Thread()
    hub: Any = get_hub()
    if '_greenaio_ranges' not in hub.__dict__:
        hub._greenaio_ranges = True
        before_end(hub, mine.give_back)
        _threads.add(mine)
    return mine


def _staying(fd: int) -> contextlib.ExitStack:
    """Keep *fd* the same file until this is closed: by its greenlet, or when the thread ends."""
    stays, thread = contextlib.ExitStack(), _this_thread()
    if fd >= 0:                         # else no number is known yet: the file is being opened
        stays.enter_context(using(fd))
    thread.stays.add(stays)
    stays.callback(thread.stays.discard, stays)
    return stays


class _Range:
    """The bytes from *start* to *end* of *inode*: held, or waited for, until `let_go`.

    The ranges that hang on this one are a list through `next` and `previous`: giving it back needs no memory.
    """

    def __init__(self, inode: Inode, start: int, end: int) -> None:
        self.inode, self.start, self.end = inode, start, end
        self.thread, self.ident = _this_thread(), get_ident()
        self.hub: Any = get_hub()
        self.event: Event | None = None     # for a greenlet that waits
        self.over = False
        self.older: _Range | None = None
        self.newer: _Range | None = None
        self.blocker: _Range | None = None
        self.first: _Range | None = None    # of those that hang on this one
        self.next: _Range | None = None
        self.previous: _Range | None = None
        generation()                    # forked by C, a child must not wait for the lock of its parent
        with _lock:
            self.ranges = _held.get(inode) or _Ranges()
            count = self.ranges.count + 1
            self.thread.ranges.add(self)
            try:
                _held[inode] = self.ranges
            except MemoryError:
                self.thread.ranges.discard(self)
                raise
            # From here on nothing needs memory.
            self.older = self.ranges.newest
            if self.older is not None:
                self.older.newer = self
            self.ranges.newest, self.ranges.count = self, count
            if start < self.ranges.high and self.ranges.low < end:      # else none overlaps
                self._hang()
            self.ranges.low, self.ranges.high = min(self.ranges.low, start), max(self.ranges.high, end)

    def followers(self) -> Iterator[_Range]:
        """Those that hang on this one."""
        one = self.first
        while one is not None:
            yield one
            one = one.next

    @property
    def granted(self) -> bool:
        return self.blocker is None

    def overlaps(self, other: _Range) -> bool:
        return self.start < other.end and other.start < self.end

    def _hang(self) -> None:
        """Hang on the newest earlier range that overlaps; granted if there is none. With the lock."""
        other = self.older
        while other is not None and not (other.start < self.end and self.start < other.end):
            other = other.older
        self.blocker, self.previous, self.next = other, None, None
        if other is not None:
            self.next = other.first
            if other.first is not None:
                other.first.previous = self
            other.first = self

    def _unhang(self) -> None:
        if self.previous is not None:
            self.previous.next = self.next
        elif self.blocker is not None:
            self.blocker.first = self.next
        if self.next is not None:
            self.next.previous = self.previous

    def wait(self) -> None:
        """Wait until it is granted."""
        self.event = Event()
        while not self.granted:         # now another thread's grant is seen here, or sets the event
            self.event.wait(ANOTHER_LOOK)

    def let_go(self) -> None:
        """Give it back, granted or not; twice is fine. From any thread."""
        granted: _Range | None = None
        generation()
        with _lock:
            if self.over:
                return
            self.over = True
            self.thread.ranges.discard(self)
            self._unlink()
            self._unhang()
            one, self.first = self.first, None
            while one is not None:
                following = one.next
                one._hang()
                if one.granted:
                    one.next, granted = granted, one
                one = following
        while granted is not None:
            one, granted = granted, granted.next
            one.next = None
            one._wake()

    def _unlink(self) -> None:
        if self.newer is not None:
            self.newer.older = self.older
        else:
            self.ranges.newest = self.older
        if self.older is not None:
            self.older.newer = self.newer
        self.ranges.count -= 1
        if self.ranges.newest is None:
            del _held[self.inode]

    def _wake(self) -> None:
        if self.event is None:
            return                      # it has not begun to wait, and will look first
        if self.ident == get_ident():
            self.event.set()
            return
        loop = self.hub.loop            # None if its thread has ended
        if loop is not None:
            with contextlib.suppress(ValueError):       # the loop is destroyed
                loop.run_callback_threadsafe(self.event.set)


def hold(fd: int, inode: Inode, start: int, end: int, is_being_written: Callable[[], bool],
         is_unsettled: Callable[[], bool]) -> _Range:
    """Return the range from *start* to *end* of the file *fd*, held: after all earlier ones that overlap it,
    and after the writes there that took no turn, because no range was held when they began.

    *is_being_written* tells whether there are such writes in the range, *is_unsettled* whether there are any.
    Raises EBADF in a forked child that has closed *fd* during the wait.
    """
    mine, forks = _Range(inode, start, end), generation()
    try:
        with _staying(fd):
            if not mine.granted:
                mine.wait()
            while not mine.ranges.settled and is_being_written():
                gevent.sleep(SETTLING)
            _fallback.check_kept(fd, forks)
        if not mine.ranges.settled and not is_unsettled():
            mine.ranges.settled = True
    except BaseException as error:
        mine.let_go()
        thrown(error)
        raise
    return mine


def _after_fork_in_child() -> None:
    global _lock
    _lock = _make_lock()                        # another thread may have held the old one
    for thread in list(_threads):
        if thread.ident != get_ident():         # it stayed with the parent
            thread.give_back()
    for ranges in list(_held.values()):
        for mine in list(ranges):
            if mine.ident != get_ident():       # just being made
                mine.let_go()


listen(_after_fork_in_child)


class _Held(Protocol):
    def let_go(self) -> None: ...


class Shielded:
    """``work()``, in a greenlet of its own. If a greenlet that waits for it is killed, the work is finished
    all the same. *fd* stays the same file until then, even if it is closed. At its end *held* is given back;
    if this raises, the caller has to."""

    def __init__(self, fd: int, work: Callable[[], int], held: _Held | None = None) -> None:
        self._work, self._fd, self._forks = work, fd, generation()
        self._result = -1
        self._error: BaseException | None = gevent.GreenletExit()       # until it has begun
        self._stays = _staying(fd)
        try:
            if held is not None:
                self._stays.callback(held.let_go)
            self.greenlet = gevent.Greenlet(self._capture)
            self.greenlet.rawlink(self._end)       # also if it is killed before it has begun
            self.greenlet.start()
        except BaseException:
            self._stays.close()
            raise

    def _end(self, _: object) -> None:
        self._stays.close()

    def _capture(self) -> None:
        with self._stays:
            try:
                _fallback.check_kept(self._fd, self._forks)
                self._result, self._error = self._work(), None
            except BaseException as error:  # not printed, but raised by `get`
                self._error = error

    def get(self) -> int:
        """Wait for the result of the work, or raise its exception: once, but after a kill again."""
        try:
            self.greenlet.join()
        except BaseException as error:
            thrown(error)
            raise
        if self._error is None:
            return self._result
        try:
            raise self._error
        finally:
            self._error = None          # its traceback has us


def shielded(fd: int, work: Callable[[], int]) -> int:
    """Return ``work()``, which is finished even if this greenlet is killed: no sector is left half done."""
    return Shielded(fd, work).get()


def write(data: bytes, offset: int, align: int, size: Callable[[], int],
          read: Callable[[memoryview, int], int], write: Callable[[memoryview, int], int],
          truncate: Callable[[int], int], span: memoryview) -> int:
    """Write *data* at *offset* of a file of ``size()`` bytes, whose range is held, through the zeroed *span*.

    *read*, *write* and *truncate* do the aligned work; where it fails they return minus the errno, as this.
    Else it returns bytes of *data* written. The file ends where it would by pwrite, however the sectors fall.
    """
    end = offset + len(data)
    start = offset - offset % align
    last = end - end % align            # where the last sector begins, if it is not whole
    result, before = 0, size()
    if start < offset and start < before:
        result = read(span[:align], start)
    if result >= 0 and last < end < before and (last > start or start == offset):
        result = read(span[last - start:last - start + align], last)
    if result < 0:
        return result
    span[offset - start:end - start] = data
    written = write(span, start)
    if written < 0:
        return written
    longer = start + written
    end = min(end, longer)
    if end < longer == size() != before:    # else it does not end with our last sector: others made it longer
        result = truncate(before if end < before < longer else end)
    return result if result < 0 else max(0, min(len(data), longer - offset))
