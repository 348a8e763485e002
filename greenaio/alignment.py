"""Misaligned O_DIRECT writes: read, modify, write, with nobody else in the same sectors meanwhile.

Two neighbours in one sector would lose each other's bytes: the one writes the whole sector as it was when
it read it. So a write that shares a sector with others holds that range of the file, and as long as anybody
does, the aligned writes to that file take their turn too. Between processes nothing is held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original

from greenaio import _fallback
from greenaio._ends import before_destroy, forget, thrown

Inode = tuple[int, int]         # device, inode
EVERYTHING = 1 << 63            # the end of a range that makes the file longer

get_ident = get_original('_thread', 'get_ident')
_held: dict[Inode, list[_Range]] = {}


def is_held(inode: Inode) -> bool:
    """Whether some write holds a range of this file."""
    return inode in _held


def refuse_if_held(inode: Inode, start: int = 0, end: int = EVERYTHING) -> None:
    """Raise BlockingSwitchOutError if a write holds any byte from *start* to *end*."""
    if any(other.start < end and start < other.end for other in _held.get(inode, ())):
        raise BlockingSwitchOutError(
            'a parked greenlet is changing these sectors, and can\'t go on inside greenaio.uninterrupted()')


class _Range:
    """What somebody holds of *inode*: the bytes from *start* to *end*, until `let_go`."""

    def __init__(self, inode: Inode, start: int, end: int) -> None:
        self.inode, self.start, self.end = inode, start, end
        self.over = Event()
        self.thread = get_ident()
        _held.setdefault(inode, []).append(self)

    def let_go(self) -> None:
        """Once is enough: also by others, where the greenlet that holds it can never go on."""
        if self.over.is_set():
            return
        self.over.set()
        _held[self.inode].remove(self)
        if not _held[self.inode]:
            del _held[self.inode]


@contextlib.contextmanager
def holding(inode: Inode, start: int, end: int, is_being_written: Callable[[], bool]) -> Iterator[None]:
    """Hold the bytes from *start* to *end*: waits for those who asked before and overlap, and for writes that
    took no turn, for nobody held anything when they began."""
    before = [other for other in _held.get(inode, ()) if other.start < end and start < other.end]
    mine = _Range(inode, start, end)
    hub = get_hub()
    before_destroy(hub, mine.let_go)
    try:
        for other in before:
            other.over.wait()
        while is_being_written():       # too rare for anything better than a look every millisecond
            gevent.sleep(0.001)
        yield
    finally:
        forget(hub, mine.let_go)
        mine.let_go()


def _after_fork_in_child() -> None:
    for mine in [mine for ranges in _held.values() for mine in ranges]:
        if mine.thread != get_ident():          # it stayed with the parent
            mine.let_go()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Shielded:
    """``work()``, in a greenlet of its own. If a greenlet that waits for it is killed, the work is finished
    all the same. *fd* stays the same file until then, even if it is closed."""

    def __init__(self, fd: int, work: Callable[[], int]) -> None:
        self._stays = contextlib.ExitStack()
        self._stays.enter_context(_fallback.using(fd))
        self._work = work
        self._result = -1
        self._error: BaseException | None = gevent.GreenletExit()       # until it has begun
        self._greenlet = gevent.spawn(self._capture)
        self._greenlet.rawlink(lambda _: self._stays.close())

    def _capture(self) -> None:
        with self._stays:
            try:
                self._result, self._error = self._work(), None
            except BaseException as error:  # not printed, but raised by `get`
                self._error = error

    def get(self) -> int:
        """Wait for the result of the work, or raise its exception: once, but after a kill again."""
        try:
            self._greenlet.join()
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


def write(data: bytes, offset: int, align: int, size: int,
          read: Callable[[memoryview, int], int], write: Callable[[memoryview, int], int],
          truncate: Callable[[int], int], span: memoryview) -> int:
    """Write *data* at *offset* of a file of *size* bytes, whose range is held, through the zeroed *span*.

    *read*, *write* and *truncate* do the aligned work; where it fails they return minus the errno, as this.
    Else it returns bytes of *data* written. The file ends where it would by pwrite, however the sectors fall.
    """
    end = offset + len(data)
    start = offset - offset % align
    last = end - end % align            # where the last sector begins, if it is not whole
    result = 0
    if start < offset and start < size:
        result = read(span[:align], start)
    if result >= 0 and last < end < size and (last > start or start == offset):
        result = read(span[last - start:last - start + align], last)
    if result < 0:
        return result
    span[offset - start:end - start] = data
    written = write(span, start)
    if written < 0:
        return written
    longer = start + written
    end = max(size, min(end, longer))
    result = truncate(end) if longer > end else 0
    return result if result < 0 else max(0, min(len(data), longer - offset))
