"""Zones: parts of a device that are written from their begin to their end, each with its write pointer.

For a zoned device the kernel reports the zones, and wants the writes to a zone one after another. An ordinary
file is divided. Its data has been written and its holes have not, so the pointers outlive the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from gevent.event import Event
from gevent.lock import BoundedSemaphore

from greenaio._files.extension import _calls

# linux/blkzoned.h
BLKREPORTZONE, BLKRESETZONE = 0xC0101282, 0x40101283
BLKGETZONESZ = 0x80041284
REPORT = struct.Struct('=QII')                      # first sector, zones, flags
# The start, the length and the write pointer; then the type, and at the end the capacity.
ZONE = struct.Struct('=QQQBBBB4xQ24x')
RANGE = struct.Struct('=QQ')                        # first sector, sectors
FLAG_CAPACITY = 1                                   # capacities are reported
SECTOR, CONVENTIONAL, AT_ONCE = 512, 1, 1024
# In bytes. A hole is a number of whole pages.
PAGE = 4096


class Zone(NamedTuple):
    """A zone, which `BlockDevice.zone_append` fills: *capacity* bytes from *offset* on. The next goes to
    *write_pointer*, an offset in the device."""

    offset: int
    capacity: int
    write_pointer: int


class _Zone:
    def __init__(self, offset: int, length: int, capacity: int, write_pointer: int) -> None:
        self.offset, self.length, self.end = offset, length, offset + capacity
        self.write_pointer = write_pointer
        # How many appends run beside each other.
        self.appends = 0

    # These two are made when they are needed, because a large device has many zones.

    @functools.cached_property
    def turn(self) -> BoundedSemaphore:
        return BoundedSemaphore(1)

    @functools.cached_property
    def idle(self) -> Event:
        """Set if there are no appends."""
        idle = Event()
        idle.set()
        return idle

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """Count an append during the ``with`` block. It does not hold the turn during the write, but the
        owner of the turn may wait until the zone is `idle`."""
        with self.turn:
            self.appends += 1
            self.idle.clear()
        try:
            yield
        finally:
            self.appends -= 1
            if self.appends == 0:
                self.idle.set()


class Zones:
    """The zones of *file*, which has *size* bytes. Without a *zone_size* an ordinary file has none."""

    def __init__(self, file: Any, size: int, zone_size: int | None) -> None:
        self._file = file
        self._is_kernels = _is_zoned(file)
        if self._is_kernels:
            if zone_size is not None:
                raise ValueError('a zoned device has zones of its own')
            found = _reported(file.fileno(), 0, size)
        elif zone_size is not None:
            if zone_size % PAGE or not stat.S_ISREG(file.kind):
                raise ValueError(f'zone_size is for ordinary files, and a multiple of {PAGE}')
            found = _divided(file.fileno(), size - size % PAGE, zone_size)
        else:
            found = []
        self._zones: dict[int, _Zone] = {zone.offset: zone for zone in found}

    def __bool__(self) -> bool:
        return bool(self._zones)

    def told(self) -> list[Zone]:
        """Return the zones as the program sees them."""
        return [Zone(zone.offset, zone.end - zone.offset, zone.write_pointer)
                for zone in self._zones.values()]

    def _at(self, offset: int) -> _Zone:
        """Return the zone that begins at *offset*. Raise OSError (EINVAL) if none does."""
        try:
            return self._zones[offset]
        except KeyError:
            raise OSError(errno.EINVAL, 'No zone begins there', self._file.name) from None

    def check_room(self, offset: int, nbytes: int) -> None:
        """Raise OSError (ENOSPC) as `appending` would, unless another greenlet may be about to make room."""
        zone = self._at(offset)
        if not zone.turn.locked():
            self._check_room(zone, nbytes)

    def _check_room(self, zone: _Zone, nbytes: int) -> None:
        if zone.write_pointer + nbytes > zone.end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    @contextlib.contextmanager
    def appending(self, offset: int, nbytes: int) -> Iterator[int]:
        """Yield the offset for a write of *nbytes*, which the caller makes inside the ``with`` block. Raise
        OSError (ENOSPC) if the zone has no room. If the write fails, the write pointer goes back as far as
        possible."""
        zone = self._at(offset)
        with zone.turn if self._is_kernels else zone.beside_others():
            self._check_room(zone, nbytes)
            where = zone.write_pointer
            zone.write_pointer += nbytes
            try:
                yield where
            except BaseException:
                if self._is_kernels:
                    # The kernel knows how far the write came.
                    now, = _reported(self._file.fileno(), offset, offset + zone.length)
                    zone.write_pointer = now.write_pointer
                elif zone.write_pointer == where + nbytes:
                    zone.write_pointer = where
                raise

    @contextlib.contextmanager
    def resetting(self, offset: int) -> Iterator[int]:
        """Empty a zone. Yield the number of bytes that the caller has to make a hole."""
        zone = self._at(offset)
        with zone.turn:
            zone.idle.wait()
            if self._is_kernels:
                what = RANGE.pack(offset // SECTOR, zone.length // SECTOR)
                _calls.ioctl(self._file.fileno(), BLKRESETZONE, what)
                yield 0
            else:
                yield zone.length
            zone.write_pointer = offset


def _is_zoned(file: Any) -> bool:
    """Return whether the file is a zoned device. The answer is in memory, so the call does not wait."""
    if not stat.S_ISBLK(file.kind):
        return False
    try:
        return fcntl.ioctl(file.fileno(), BLKGETZONESZ, bytes(4)) != bytes(4)
    except OSError:
        return False


def _reported(fd: int, offset: int, end: int) -> list[_Zone]:
    """Return the zones from *offset* to *end* that have to be written in order. Raise OSError."""
    found = []
    while offset < end:
        memory = _calls.ioctl(fd, BLKREPORTZONE,
                              REPORT.pack(offset // SECTOR, AT_ONCE, 0) + bytes(AT_ONCE * ZONE.size))
        _, count, flags = REPORT.unpack_from(memory)
        if count == 0:
            break
        for i in range(count):
            start, length, pointer, kind, _, _, _, capacity = ZONE.unpack_from(
                memory, REPORT.size + i * ZONE.size)
            capacity = capacity if flags & FLAG_CAPACITY else length
            offset = (start + length) * SECTOR
            if kind != CONVENTIONAL and start * SECTOR < end:
                # The pointer of a full zone may be any number, so keep it inside the zone.
                pointer = min(max(pointer, start), start + capacity)
                found.append(_Zone(start * SECTOR, length * SECTOR, capacity * SECTOR, pointer * SECTOR))
    return found


def _divided(fd: int, size: int, zone_size: int) -> list[_Zone]:
    """Return the zones of an ordinary file, each with its write pointer at the end of its last data."""
    found = []
    # After so many bytes a thread is asked again, and other greenlets run.
    step = AT_ONCE * zone_size
    for first in range(0, size, step):
        last = min(first + step, size)
        zones = [_Zone(start, min(zone_size, last - start), min(zone_size, last - start), start)
                 for start in range(first, last, zone_size)]
        for start, end in _data(fd, first, last):
            for zone in zones[(start - first) // zone_size:-((first - end) // zone_size)]:
                zone.write_pointer = min(end, zone.end)
        found += zones
    return found


def _data(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the begin and the end of each piece of data between *offset* and *end*, in order."""
    while offset < end:
        for nbytes, is_data in _calls.extents(fd, offset, end):
            if is_data:
                yield offset, offset + nbytes
            offset += nbytes
