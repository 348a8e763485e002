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
from greenaio._ends import before_destroy, forget

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


def shielded(fd: int, work: Callable[[], int]) -> int:
    """Return ``work()``, done in a greenlet of its own: who is killed meanwhile leaves it to finish, so that
    no sector is left half done, and its range is given back when the disk has done with it. *fd* stays what
    it is so long, whoever closes it."""
    stays = contextlib.ExitStack()
    stays.enter_context(_fallback.using(fd))

    def capture() -> tuple[int, BaseException | None]:
        with stays:
            try:
                return work(), None
            except Exception as error:  # not printed, but raised where it is waited for
                return -1, error

    captured: tuple[int, BaseException | None] = gevent.spawn(capture).get()
    if captured[1] is not None:
        raise captured[1]
    return captured[0]


def write(data: bytes, offset: int, align: int, size: int,
          read: Callable[[memoryview, int], int], write: Callable[[memoryview, int], int],
          truncate: Callable[[int], None], span: memoryview) -> int:
    """Write *data* at *offset* of a file of *size* bytes, whose range is held, through the zeroed *span*.

    *read*, *write* and *truncate* do the aligned work. Returns bytes of *data* written. The file ends where
    it would by pwrite, however the sectors fall.
    """
    end = offset + len(data)
    start = offset - offset % align
    last = end - end % align            # where the last sector begins, if it is not whole
    if start < offset and start < size:
        read(span[:align], start)
    if last < end < size and (last > start or start == offset):
        read(span[last - start:last - start + align], last)
    span[offset - start:end - start] = data
    written = write(span, start)
    longer = start + written
    end = max(size, min(end, longer))
    if longer > end:
        truncate(end)
    return max(0, min(len(data), longer - offset))
