"""A write-ahead log with group commit: ``python examples/write_ahead_log.py --compare``.

`append` returns when its record is on the disk. One fdatasync serves all who came before it began, hundreds
of greenlets if need be; in a thread pool each pays for its own. After a crash `replay` yields the records in
order, all whose append returned among them, and stops at the first checksum that is wrong.

Segments are files of zeros, made ahead: to overwrite them takes no allocation, and leaves fdatasync no
metadata to write. Groups of records fill them, each group in blocks of its own: no block with something
acknowledged in it is written again, so none can be torn. The price is half a block a group, and that all is
written twice. There are no checkpoints here, the log only grows.
"""

from __future__ import annotations

import signal

if __name__ == '__main__':      # the imports take a while: Ctrl-C then gives no traceback, either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import fcntl
import glob
import itertools
import os
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator

import gevent
from gevent.event import AsyncResult

from greenaio import File, aligned_buffer
from greenaio.os import ftruncate, stat

BLOCK = 4096                        # bytes: a write that is torn spoils no other block
SEGMENT = 16 << 20                  # bytes
HEADER = struct.Struct('<QI')       # of a group: its first record's number, bytes of all its records
WORD = struct.Struct('<I')          # the length before each record, the crc32 behind the last


class Log:
    """The log in *folder*, for the greenlets of one hub. Raises BlockingIOError if somebody has it open."""

    def __init__(self, folder: str, segment: int = SEGMENT) -> None:
        self._folder, self._segment = folder, segment
        self._records = bytearray()                         # the next group ...
        self._durable: AsyncResult[None] = AsyncResult()    # ... and who waits for it
        self._committer: gevent.Greenlet[..., None] | None = None
        self._file: File | None = None
        self._end = 0                   # of the groups in that file
        self._directory = File(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._first = self._next = self._recover()
        except BaseException:
            self._directory.close()
            raise
        self._spare = gevent.spawn(self._create)

    def append(self, record: bytes) -> int:
        """Return the record's number once it is durable. Killed before that, it may be in the log or not.

        After an OSError every append raises that one: nobody knows any more what the disk has."""
        record = memoryview(record).tobytes()       # an array's len() counts its items
        room = self._segment - HEADER.size - WORD.size
        frame = WORD.pack(len(record)) + record
        if len(frame) > room:
            raise ValueError(f'{len(record)} bytes do not fit into a segment of {self._segment}')
        while self._durable.ready() or len(self._records) + len(frame) > room:
            self._durable.get()         # a full group goes first; raises if the log has stopped
        self._records += frame
        durable, number = self._durable, self._next
        self._next += 1
        if not self._committer:
            self._committer = gevent.spawn(self._commit)
        durable.get()
        return number

    def close(self) -> None:
        """Wait for what was appended, refuse what comes."""
        while self._committer:
            self._committer.join()
        self._durable.set_exception(ValueError('the log is closed'))
        self._spare.join()      # not killed: what it had asked for would go on, and hold the folder's lock
        if self._file:
            self._file.close()
        self._directory.close()

    @staticmethod
    def replay(folder: str) -> Iterator[tuple[int, bytes]]:
        """The records in *folder* and their numbers, which begin at 1."""
        for _, _, first, records in groups(folder):
            yield from enumerate(records, first)

    def _commit(self) -> None:
        """In a greenlet of the log's own: whichever caller is killed, the others get their answer."""
        durable = self._durable
        try:
            while self._records:
                blocks, durable = self._take()
                file = self._with_room(len(blocks))
                write(file, blocks, self._end)
                file.fdatasync()
                self._end += len(blocks)
                durable.set()
        except BaseException as error:
            failure = error if isinstance(error, OSError) else OSError(errno.ECANCELED, 'The log was stopped')
            durable.set_exception(failure)
            self._durable.set_exception(failure)
            if failure is not error:
                raise

    def _take(self) -> tuple[memoryview, AsyncResult[None]]:
        """The group as the disk shall have it, and who waits. In memory of its own: the kernel reads an
        abandoned write's for longer."""
        data = HEADER.pack(self._first, len(self._records)) + self._records
        data += WORD.pack(zlib.crc32(data))
        blocks, durable = aligned_buffer(-(-len(data) // BLOCK) * BLOCK), self._durable
        blocks[:len(data)] = data
        self._first, self._records, self._durable = self._next, bytearray(), AsyncResult()
        return blocks, durable

    def _with_room(self, nbytes: int) -> File:
        """The segment in use, or the next one."""
        if self._file is None or self._end + nbytes > self._segment:
            full, self._file, self._end = self._file, File(self._spare.get(), os.O_RDWR | os.O_DIRECT), 0
            self._spare = gevent.spawn(self._create)
            if full:
                full.close()
        return self._file

    def _create(self) -> str:
        path = os.path.join(self._folder, f'{len(segments(self._folder)) + 1:08}.wal')
        zeros = aligned_buffer(min(1 << 20, self._segment))
        with File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT) as file:
            for at in range(0, self._segment, len(zeros)):
                write(file, zeros[:self._segment - at], at)
            file.fsync()
        self._directory.fsync()
        return path

    def _recover(self) -> int:
        """Return the next record's number. Cut off what is behind the last good group: it might pass for the
        sequel of what is written next. Make the group itself durable: it may never have been."""
        last, end, following = '', 0, 1
        for path, at, first, records in groups(self._folder):
            last, end, following = path, at, first + len(records)
        for path in segments(self._folder):
            if path > last:
                os.unlink(path)
        if last:
            with File(last, os.O_RDWR) as file:
                ftruncate(file.fileno(), end)
                file.fsync()
        self._directory.fsync()
        return following


def segments(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), '[0-9]' * 8 + '.wal')))


def groups(folder: str) -> Iterator[tuple[str, int, int, list[bytes]]]:
    """Of each good group: its segment, where its blocks end, its first record's number, its records."""
    expected = 1
    for path in segments(folder):
        with File(path, os.O_RDONLY | os.O_DIRECT) as file:
            size = stat(path).st_size
            data = memoryview(file.pread(size, 0))
        if len(data) < size:            # a read takes 2 GiB at most; what is not seen would be cut off
            raise OSError(errno.EIO, 'Short read', path)
        at = 0
        while at + HEADER.size <= len(data):
            first, nbytes = HEADER.unpack_from(data, at)
            end = at + HEADER.size + nbytes
            if first != expected or data[end:end + WORD.size] != WORD.pack(zlib.crc32(data[at:end])):
                break                   # the end of this segment: the next one says whether that of the log
            records, place = [], at + HEADER.size
            while place < end:
                n, = WORD.unpack_from(data, place)
                records.append(bytes(data[place + WORD.size:place + WORD.size + n]))
                place += WORD.size + n
            expected += len(records)
            at = -(-(end + WORD.size) // BLOCK) * BLOCK
            yield path, at, first, records


def write(file: File, data: memoryview, offset: int) -> None:
    if file.pwrite(data, offset) != len(data):
        raise OSError(errno.ENOSPC, 'Short write', file.name)


# The demonstration -------------------------------------------------------------------------------

def measure(name: str, append: Callable[[bytes], object], arguments: argparse.Namespace) -> None:
    """Print how many commits a second so many greenlets get out of *append*."""
    done, start = 0, time.monotonic()

    def work() -> None:
        nonlocal done
        while time.monotonic() < start + arguments.seconds:
            append(bytes(100))
            done += 1

    workers = [gevent.spawn(work) for _ in range(arguments.greenlets)]
    try:
        gevent.joinall(workers, raise_error=True)
    finally:
        gevent.killall(workers)         # after Ctrl-C
    print(f'{name:<40} {done / (time.monotonic() - start):9,.0f} commits/s', flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', default='.', metavar='FOLDER', help='on the disk to measure')
    parser.add_argument('--greenlets', type=int, default=64)
    parser.add_argument('--seconds', type=float, default=3)
    parser.add_argument('--compare', action='store_true', help="measure gevent's thread pool too")
    arguments = parser.parse_args()
    if (not 1 <= arguments.greenlets <= 100_000 or not 0 < arguments.seconds <= 86400
            or not os.path.isdir(arguments.folder)):
        parser.error('FOLDER has to be there, GREENLETS from 1 to 100,000, SECONDS above 0 and up to 86,400')
    gevent.get_hub().NOT_ERROR += (OSError,)    # the waiter for a greenlet tells its error, gevent does not
    compare(arguments)
    return 0


def compare(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with contextlib.closing(Log(folder)) as log:
            log.append(b'the segment is there')
            measure('group commit', log.append, arguments)
        if arguments.compare:
            with open(segments(folder)[0], 'r+b') as file:
                file.read()             # into the page cache, or a write would have to wait for that
                places = itertools.cycle(range(0, SEGMENT, BLOCK))

                def commit(record: bytes) -> None:
                    os.pwrite(file.fileno(), record, next(places))
                    os.fdatasync(file.fileno())

                pool = gevent.get_hub().threadpool
                try:
                    measure('thread pool, write and fdatasync each',
                            lambda record: pool.apply(commit, (record,)), arguments)
                finally:
                    pool.join()         # its threads use the file


def run() -> int:
    """Run `main`. Ctrl-C, a disk that fails, or output that is full or closed ends it without a traceback."""
    # KeyboardInterrupt would reach the hub or any greenlet, and gevent would print it.
    gevent.signal_handler(signal.SIGINT, gevent.kill, gevent.getcurrent(), KeyboardInterrupt)
    gevent.signal_handler(signal.SIGTERM, gevent.kill, gevent.getcurrent(), SystemExit(143))
    try:
        status = main()
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:      # a variable of the environment may be wrong, too
        if not isinstance(error, BrokenPipeError):      # a reader such as head has seen enough
            print(f'write_ahead_log.py: {error}', file=sys.stderr)
        # The interpreter would try to write the rest at its end, and complain.
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == '__main__':
    sys.exit(run())
