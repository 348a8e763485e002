"""Misaligned O_DIRECT writes: read, modify, write, with no other write in the same sectors in between.

Two neighbours in one sector would lose each other's bytes:

    one                     two                     the sector
    reads it: aa aa
                            reads it: aa aa
    writes: 11 aa                                   11 aa
                            writes: aa 22           aa 22: the bytes of one are lost

So a misaligned write holds the range of its sectors, see `ranges`.
"""

from __future__ import annotations

from collections.abc import Callable


def write(data: bytes, offset: int, align: int, size: Callable[[], int],
          read: Callable[[memoryview, int], int], write: Callable[[memoryview, int], int],
          truncate: Callable[[int], int], span: memoryview) -> int:
    """Write *data* at *offset* of a file of ``size()`` bytes, whose range is held, through the zeroed *span*.

    *read*, *write* and *truncate* do the aligned work, and return minus the errno if it fails. Return the
    number of bytes of *data* written, or minus the errno. The file ends where it would end after a pwrite,
    wherever the sectors end.
    """
    end = offset + len(data)
    start = offset - offset % align
    # The offset of the last sector, if the data fills only a part of it.
    last = end - end % align
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
    # Otherwise the file does not end with our last sector, because another write made it longer.
    if end < longer == size() != before:
        result = truncate(before if end < before < longer else end)
    return result if result < 0 else max(0, min(len(data), longer - offset))
