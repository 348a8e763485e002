"""Misaligned O_DIRECT writes: read, modify, write, with nobody else in the same sectors meanwhile.

Two neighbours in one sector would lose each other's bytes: the one writes the whole sector as it was when
it read it. So a write that shares a sector with others holds that range of the file, and as long as anybody
does, the aligned writes to that file take their turn too. Between processes nothing is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gevent
from gevent.event import Event

from greenaio import _fallback

Inode = tuple[int, int]         # device, inode
EVERYTHING = 1 << 63            # the end of a range that makes the file longer

_held: dict[Inode, list[tuple[int, int, Event]]] = {}


def is_held(inode: Inode) -> bool:
    """Whether some write holds a range of this file."""
    return inode in _held


@contextlib.contextmanager
def holding(inode: Inode, start: int, end: int) -> Iterator[bool]:
    """Hold the bytes from *start* to *end*: waits for those who asked before and overlap. Yields whether
    nobody held anything of the file before."""
    is_first = inode not in _held
    ranges = _held.setdefault(inode, [])
    before = [event for first, last, event in ranges if first < end and start < last]
    mine = (start, end, Event())
    ranges.append(mine)
    try:
        for event in before:
            event.wait()
        yield is_first
    finally:
        mine[2].set()
        ranges.remove(mine)
        if not ranges:
            del _held[inode]


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


def wait_for_all(requests: Sequence[Any]) -> None:
    """Wait for writes that began before anybody held a range. Too rare for anything better than a look
    every millisecond."""
    while any(request.result is None for request in requests):
        gevent.sleep(0.001)


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
