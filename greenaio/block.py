"""`BlockDevice`: a disk, or an image of one, with the contract of QEMU's block layer.

Requests are whole or an error: a read past the end is filled up with zeros, a write that can't be completed
is ENOSPC. The bytes of a write that has returned are on the disk when a later `flush` returns. Only flushes
wait in a list here: reads and writes go to a `File`, which knows the ways.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gevent

from greenaio._core.ends import was_thrown
from greenaio._files.arguments import flat
from greenaio._files.extension import File, _calls, aligned_buffer, native
from greenaio._files.shield import shielded
from greenaio._files.streams import Block
from greenaio._files.zones import Zone, Zones

__all__ = ['BlockDevice', 'Zone']

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16      # linux/falloc.h
PUNCH, ZERO = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)     # of fallocate
UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS)                  # of RWF_DSYNC; ENODEV is of a disk that has gone
REFUSED = (errno.EBADF, errno.EFAULT, errno.EFBIG, errno.EINVAL)    # a write, before any of it was done
OFFSET_MAX = (1 << 63) - 1      # bytes: the kernel's loff_t

PAGE = 4096                     # bytes: what is zeroed without being written comes in these
ZEROS = aligned_buffer(1 << 20).toreadonly()        # and where that can't be, so much is written at a time
BURST = 0.1                     # seconds' worth that a throttled device has at once: QEMU's share too


class BlockDevice:
    """The disk or image *path*, for the greenlets of one hub.

    *direct* (O_DIRECT) passes by the page cache: reads and writes at multiples of `alignment`, in memory
    that is aligned too, move no byte twice; others work and cost more. *create_size*, in bytes, makes a new
    image. *iops* and *bps* limit operations and bytes a second; *max_batch* is as for `File`. *zone_size*,
    in bytes, divides an ordinary file into zones; a zoned device has its own.

    Sizes and offsets are in bytes. Raises OSError, with EINVAL for a negative one; ValueError once closed. If
    a greenlet is killed in a write, that may still happen, before or after any flush.
    """

    def __init__(self, path: StrPath, *, readonly: bool = False, direct: bool = True,
                 max_batch: int | None = None, create_size: int | None = None, zone_size: int | None = None,
                 iops: float | None = None, bps: float | None = None) -> None:
        if readonly and create_size is not None:
            raise ValueError('an image that is made can not be readonly')
        for name, value in {'create_size': create_size, 'zone_size': zone_size, 'iops': iops,
                            'bps': bps}.items():
            if value is not None and (not value >= 0 or name != 'create_size' and value == 0):
                raise ValueError(f'{name} can not be {value}')
        flags = os.O_RDONLY if readonly else os.O_RDWR
        if direct and native:           # Python threads align nothing
            flags |= os.O_DIRECT
        if create_size is not None:
            flags |= os.O_CREAT | os.O_EXCL
        self._readonly = readonly
        self._throttle = _Throttle(iops, bps) if iops or bps else None
        try:
            self._file = File(path, flags, **({} if max_batch is None else {'max_batch': max_batch}))
        except OSError as error:        # O_DIRECT is refused once the file was made, and EEXIST came before
            if create_size is not None and error.errno == errno.EINVAL and not was_thrown(error):
                _unlink(path)
            raise
        try:
            if not (stat.S_ISREG(self._file.kind) or stat.S_ISBLK(self._file.kind)):
                raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), self._file.name)
            if create_size:
                _calls.ftruncate(self._file.fileno(), create_size)
            self._size = _calls.lseek(self._file.fileno(), 0, os.SEEK_END)
            self._zones = Zones(self._file, self._size, zone_size)
        except BaseException:
            self._file.close()
            if create_size is not None:     # O_EXCL: no other process made it
                _unlink(path)
            raise
        self._writes = _Writes(self._file)

    @property
    def size(self) -> int:
        """Bytes from the first to the last."""
        self._file.fileno()
        return self._size

    @property
    def alignment(self) -> int:
        """Memory, offsets and lengths should be multiples of so many bytes; 1 if it does not matter."""
        return self._file.alignment

    @property
    def readonly(self) -> bool:
        """Whether it was opened so."""
        return self._readonly

    def __repr__(self) -> str:
        return f'<greenaio.block.BlockDevice {self._file.name!r}{" closed" if self._file.closed else ""}>'

    def __enter__(self) -> BlockDevice:
        self._file.fileno()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; twice is fine. Flushes nothing."""
        self._file.close()

    # Reading ----------------------------------------------------------------------------------

    def pread(self, n: int, offset: int) -> bytes:
        """Return *n* bytes from *offset* on; zeros past the end."""
        self._check_range(n, offset)
        if self._throttle is not None:
            bytes(n)                    # a MemoryError is to come before its turn
            self._throttle.wait(n)
        data = self._file.pread(n, offset)
        return data if len(data) == n else self._go_on_reading(data, n, offset)

    def _go_on_reading(self, data: bytes, n: int, offset: int) -> bytes:
        rest = bytearray(n - len(data))
        self._read_rest([rest], 0, offset + len(data))
        return data + rest

    def preadv(self, buffers: Sequence[Any], offset: int) -> int:
        """Fill a sequence of writable *buffers* from *offset* on, with zeros past the end; return their size.

        They are pinned until the kernel is done with them, even if the greenlet is killed."""
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        self._check_range(wanted, offset)       # to preadv(2) an offset of -1 is the file's position
        if self._throttle is not None:
            self._throttle.wait(wanted)
        done = self._file.preadv(buffers, offset)
        if done < wanted:
            self._read_rest(buffers, done, offset + done)
        return wanted

    def pread_each(self, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview | OSError]:
        """Read *ranges*, pairs of a number of bytes and an offset, all at once: yields the bytes of each, in
        order, or its OSError. Cheaper than `pread` in as many greenlets."""
        ranges = list(ranges)
        for n, offset in ranges:
            self._check_range(n, offset)
        rooms = [-(-n // PAGE) * PAGE for n, _ in ranges]       # each begins where O_DIRECT can
        memory, at, blocks = aligned_buffer(sum(rooms)), 0, []
        if self._throttle is not None:
            self._throttle.wait(sum(n for n, _ in ranges), len(ranges))
        for (n, offset), room in zip(ranges, rooms, strict=True):
            blocks.append(Block(self._file, True, memory[at:at + room], n, offset, True))
            at += room
        for block in blocks:
            try:
                done, data = block.end(), block.data
                if done < len(data):
                    self._read_rest([data], done, block.offset + done)
                yield data
            except OSError as error:
                if was_thrown(error):
                    raise
                yield error

    def _read_rest(self, buffers: Sequence[Any], done: int, offset: int) -> None:
        """A read was short: the end of the file, most likely; but the kernel takes 2 GiB at once at most."""
        rest = _behind(buffers, done)
        while rest:
            done = self._file.preadv(rest, offset) if offset < self._size else 0
            if done == 0:
                for view in rest:
                    view[:] = bytes(len(view))
                return
            offset += done
            rest = _behind(rest, done)

    def block_status(self, n: int, offset: int) -> list[tuple[int, bool]]:
        """Return lengths, and whether there is data, for *n* bytes from *offset* on. A hole reads as zeros.
        The list has one entry at least, and may stop before the end of the *n* bytes."""
        self._check(n, offset)
        try:
            return _calls.extents(self._file.fileno(), offset, offset + n)
        except OSError as error:
            if error.errno == errno.ECANCELED or was_thrown(error):     # the first by a fork
                raise
            return [(n, True)]          # unknown

    # Writing ----------------------------------------------------------------------------------

    def pwrite(self, data: Any, offset: int, *, fua: bool = False) -> int:
        """Write bytes-like *data* at *offset*, all of it; return how many bytes. With *fua* (force unit
        access) they are durable then. Raises OSError: ENOSPC past the end, and nothing is written."""
        return self.pwritev((data,), offset, fua=fua)

    def pwrite_each(self, writes: Sequence[tuple[Any, int]]) -> Iterator[int | OSError]:
        """Write *writes*, pairs of bytes-like data and an offset, all at once: yields how many bytes each
        had, in order, or its OSError. Parts that overlap land in any order. Cheaper than `pwrite` in as many
        greenlets."""
        parts = [(flat(data), offset) for data, offset in writes]
        for view, offset in parts:
            self._check(len(view), offset, writing=True)
        if self._throttle is not None:
            self._throttle.wait(sum(len(view) for view, _ in parts), len(parts))
        blocks = [Block(self._file, False, view, len(view), offset, True) for view, offset in parts]
        try:
            while blocks:
                result: int | OSError
                try:
                    with self._writes:
                        result = blocks[0].end()
                except OSError as error:
                    if was_thrown(error):
                        raise
                    result = error
                del blocks[0]
                yield result
        finally:
            if blocks:                  # killed, or given up: they land at any time, or not
                self._writes.are_unsure()

    def pwritev(self, buffers: Sequence[Any], offset: int, *, fua: bool = False) -> int:
        """`pwrite` of a sequence of *buffers*."""
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        self._check(wanted, offset, writing=True)
        if self._throttle is not None:
            self._throttle.wait(wanted)
        with self._writes:
            if fua:
                self._write_durably(buffers, wanted, offset)
            else:
                self._write_all(buffers, wanted, offset)
        return wanted

    def _write_durably(self, buffers: Sequence[Any], n: int, offset: int) -> None:
        """In a greenlet of its own: a killed one would not hear of an error of the sync."""
        views = [flat(buffer) for buffer in buffers]      # so long their sizes can't change

        def write() -> int:
            with self._writes.syncing():
                self._write_all(views, n, offset, os.RWF_DSYNC)
            return n

        shielded(self._file.fileno(), write)

    def _write_all(self, buffers: Sequence[Any], left: int, offset: int, flags: int = 0) -> None:
        while True:
            done = self._write(buffers, offset, flags)
            left -= done
            if left == 0:
                return
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
            buffers, offset = _behind(buffers, done), offset + done

    def _write(self, buffers: Sequence[Any], offset: int, flags: int) -> int:
        if flags:
            try:
                return self._file.pwritev(buffers, offset, flags)
            except OSError as error:
                if error.errno not in UNKNOWN or was_thrown(error):
                    if error.errno not in REFUSED:
                        self._writes.failed(error)
                    raise
        n = self._file.pwritev(buffers, offset)
        if flags:
            try:
                self._file.fdatasync()
            except Exception as error:
                self._writes.failed(error)
                raise
        return n

    def write_zeroes(self, n: int, offset: int, *, may_unmap: bool = True, fua: bool = False) -> int:
        """Have *n* bytes from *offset* on read as zeros; return *n*. No zeros are written where the file
        system has better; with *may_unmap* it may give the space back."""
        self._check(n, offset, writing=True)
        if self._throttle is not None:
            self._throttle.wait(n)
        first, last = _inner(n, offset)
        with self._writes:
            if not (may_unmap and self._fallocate(PUNCH, first, last) or self._fallocate(ZERO, first, last)):
                last = first
            self._write_zeros(offset, first)
            self._write_zeros(last, offset + n)
        if fua:
            self.flush()
        return n

    def _write_zeros(self, offset: int, end: int) -> None:
        while offset < end:
            n = min(len(ZEROS), end - offset)
            self._write_all((ZEROS[:n],), n, offset)
            offset += n

    def _fallocate(self, mode: int, offset: int, end: int) -> bool:
        """Whether that worked. Of pages that are not whole the page cache would zero a part, not O_DIRECT."""
        try:
            if offset < end:
                self._file.fallocate(mode, offset, end - offset)
        except OSError as error:
            if error.errno not in CANNOT or was_thrown(error):
                raise
            return False
        return True

    def discard(self, n: int, offset: int) -> int:
        """Say that *n* bytes from *offset* on are not needed: what they read as is unknown then. Return *n*.
        It is done in whole pages, and where the file system or the device can't, not at all."""
        self._check(n, offset, writing=True)
        first, last = _inner(n, offset)
        with self._writes:
            self._fallocate(PUNCH, first, last)
        return n

    def flush(self) -> None:
        """Return when all is on the disk whose write had returned before.

        Callers share: one fdatasync serves all callers before it, and no caller waits if nothing was
        written since the last. Once it has failed, what was to be flushed may be lost, so it fails for ever
        with that OSError. So it does once a write with *fua* has failed, other than for its arguments.
        """
        self._file.fileno()
        self._writes.flush()

    def resize(self, n: int) -> None:
        """Make an image *n* bytes long. Raises OSError, EINVAL for a device and where there are zones."""
        if n < 0 or not stat.S_ISREG(self._file.kind) or self._zones:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._file.name)
        with self._writes:
            _calls.ftruncate(self._file.fileno(), n)
        self._size = n

    def _check_range(self, n: int, offset: int) -> None:
        """Check a range that may lie past the end. A refused request waits for no turn, and costs nothing."""
        self._file.fileno()
        if min(operator.index(n), operator.index(offset)) < 0 or offset + n > OFFSET_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._file.name)

    def _check(self, n: int, offset: int, writing: bool = False) -> None:
        self._file.fileno()
        code = 0
        if min(operator.index(n), operator.index(offset)) < 0:
            code = errno.EINVAL
        elif writing and self._readonly:
            code = errno.EBADF          # as os.pwrite has it
        elif offset + n > self._size:
            code = errno.ENOSPC
        if code:
            raise OSError(code, os.strerror(code), self._file.name)

    # Zones ------------------------------------------------------------------------------------

    def zones(self) -> list[Zone]:
        """All zones, in order of their offsets; an empty list where there are none."""
        return self._zones.told()

    def zone_append(self, data: Any, offset: int) -> int:
        """Write bytes-like *data* at the write pointer of the zone that begins at *offset*; return where that
        was. Raises OSError: ENOSPC if there is no room for all, EINVAL if no zone begins there. Of what fails
        or is killed, a gap may remain."""
        data = flat(data)     # its size stays so long
        n = len(data)
        self._check(0, offset, writing=True)
        self._zones.check_room(offset, n)
        if self._throttle is not None:
            self._throttle.wait(n)

        def append() -> int:
            with self._zones.appending(offset, n) as where, self._writes:
                self._check(n, where, writing=True)
                self._write_all((data,), n, where)
            return where

        # In a greenlet of its own: the range is the request's, even if the caller is killed.
        return shielded(self._file.fileno(), append)

    def zone_reset(self, offset: int) -> None:
        """Empty the zone that begins at *offset*: it waits for the appends begun before, and later appends
        wait for it. If the greenlet is killed, that still happens."""
        self._check(0, offset, writing=True)

        def reset() -> int:
            with self._zones.resetting(offset) as nbytes, self._writes:
                if nbytes:
                    first, last = _inner(nbytes, offset)
                    if not self._fallocate(PUNCH, first, last):
                        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self._file.name)
            return nbytes

        # As an append: once begun it can't be stopped, and nothing may be written there before it is over.
        shielded(self._file.fileno(), reset)


class _Writes:
    """Whether the writes so far are durable. Every change of the file is made inside ``with``."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._done = 0                  # writes that have returned ...
        self._durable = 0               # ... as many as there were when the last good flush began
        self._unsure = False            # some failed or were killed: they may land at any time
        self._flushing: gevent.Greenlet[..., None] | None = None
        self._syncing: set[Any] = set()         # greenlets in a write that syncs
        self._failure: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self._done += 1
        else:
            self.are_unsure()

    def are_unsure(self) -> None:
        """Some failed, or their results are unknown: each flush from now on has something to do."""
        self._unsure = True

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        """For a write that syncs. That a writeback failed is told to one sync of the file, whichever comes
        first: so what it says is for all, and a flush waits for it."""
        me = gevent.getcurrent()
        self._syncing.add(me)
        try:
            yield
        finally:
            self._syncing.discard(me)

    def failed(self, error: Exception) -> None:
        """A sync failed. The bytes written before may be lost, and no other sync will say so."""
        if not isinstance(error, OSError) or error.errno != errno.ECANCELED:    # that is a fork's
            self._failure = self._failure or _copy(error)

    def flush(self) -> None:
        if self._unsure:
            self._done += 1
        wanted = self._done
        while self._durable < wanted or self._failure:
            if self._failure:
                raise _copy(self._failure)
            if self._flushing is None:  # a greenlet of its own: if a caller is killed, the others wait on
                self._flushing = gevent.spawn(self._flush)
            self._flushing.join()

    def _flush(self) -> None:
        done = self._done
        try:
            self._file.fdatasync()
            gevent.joinall(list(self._syncing))
            self._durable = done
        except Exception as error:
            self.failed(error)
        finally:
            self._flushing = None


def _unlink(path: StrPath) -> None:
    try:
        _calls.unlink(path)
    except OSError as error:
        if was_thrown(error):
            raise


def _copy(error: Exception) -> Exception:
    """For one of many greenlets that raise it: each has a traceback of its own."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    return type(error)(*error.args)


class _Throttle:
    """Token buckets: first come, first served."""

    def __init__(self, iops: float | None, bps: float | None) -> None:
        self._rates = iops or 0.0, bps or 0.0
        self._free = [0.0, 0.0]         # when a bucket will have let all callers through

    def wait(self, nbytes: int, operations: int = 1) -> None:
        """Wait for the turn of so many *operations*, on *nbytes* together."""
        now = time.monotonic()
        began, costs = now, [0.0, 0.0]
        for i, (amount, rate) in enumerate(zip((operations, nbytes), self._rates, strict=True)):
            if rate:
                at, costs[i] = max(self._free[i], now - BURST), amount / rate
                self._free[i] = at + costs[i]
                began = max(began, at)
        if began > now:
            try:
                gevent.sleep(began - now)
            except BaseException:       # killed: it takes nothing
                self._free = [free - cost for free, cost in zip(self._free, costs, strict=True)]
                raise


def _behind(buffers: Sequence[Any], done: int) -> list[memoryview]:
    """Return the parts of *buffers* after the first *done* bytes."""
    rest = []
    for buffer in buffers:
        view = flat(buffer)
        if done < len(view):
            rest.append(view[done:])
        done = max(0, done - len(view))
    return rest


def _inner(n: int, offset: int) -> tuple[int, int]:
    """The whole pages in a range: from where to where."""
    end = offset + n
    first = min(-(-offset // PAGE) * PAGE, end)
    return first, max(end // PAGE * PAGE, first)
