"""CRASH: ``python -m tests.faults.power_cut --cuts 1000 --type xfs``. Needs root.

A file system on a loop device is shut down in the midst of writes, as if its machine had lost power, then
mounted again and compared. What was written and synced, or written with RWF_DSYNC, and acknowledged before
the cut, is there, whole; so is what was appended, and the file's size with it. With ``--no-flush`` nothing is
synced and all is counted as if it were: the comparison must fail then.
"""

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys

import gevent

from greenaio import File, aligned_buffer
from tests.faults import long
from tests.support.disks import MIB
from tests.support.processes import run

BLOCK, WRITERS, PLACES = 4096, 16, 8    # each writer has its own blocks
SHUTDOWN = 0x8004587d           # ioctl of ext4 and xfs ...
NOLOGFLUSH = struct.pack('I', 2)        # ... the end of the journal is lost too
SIZE = {'ext4': 128, 'xfs': 320}        # MiB: xfs takes no less than 300


def content(place, version):
    return struct.pack('<QQ', place, version) * (BLOCK // 16)


def retry(*command):
    """*command*, as soon as it can be done."""
    for attempt in range(100):          # busy for as long as the last requests come home
        try:
            return run(*command)
        except subprocess.CalledProcessError:
            if attempt == 99:
                raise
        gevent.sleep(0.02)
    return None


class Writer:
    """Overwrites its places, or appends to a file of its own, and knows what it may rely on."""

    def __init__(self, folder, number, rng, flush):
        self.rng, self.flush = rng, flush
        self.base = number * PLACES
        self.appends = rng.random() < 0.3
        self.direct = rng.random() < 0.7
        self.by_flag = rng.random() < 0.3
        self.path = os.path.join(folder, f'file-{number}')
        self.started, self.durable = [0] * PLACES, [0] * PLACES
        self.count = 0                  # of blocks, if it appends
        self.is_off = False
        self.file = File(self.path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.direct else 0))
        if not self.appends:
            self.file.pwrite(bytes(PLACES * BLOCK), 0)
        self.file.fsync()

    def run(self):
        memory = aligned_buffer(BLOCK)
        try:
            while not self.is_off:
                i = self.count % PLACES if self.appends else self.rng.randrange(PLACES)
                self.started[i] += 1
                memory[:] = content(self.base + i, self.started[i])
                offset = (self.count if self.appends else i) * BLOCK
                flags = os.RWF_DSYNC if self.flush and self.by_flag else 0
                assert self.file.pwritev([memory], offset, flags) == BLOCK
                if self.flush and not self.by_flag:
                    self.rng.choice((self.file.fsync, self.file.fdatasync))()
                if self.is_off:
                    return
                self.durable[i] = self.started[i]
                self.count += self.appends
        except OSError:
            assert self.is_off, 'an error before the cut'

    def check(self):
        with open(self.path, 'rb') as file:
            found = file.read()
        if self.appends:
            assert len(found) >= self.count * BLOCK, (
                f'{self.path}: {self.count} blocks were synced, it has {len(found)} bytes')
            for i in range(self.count):
                self.compare(found, i, i // PLACES + 1, i // PLACES + 1, i % PLACES)
        else:
            for i in range(PLACES):
                self.compare(found, i, self.durable[i], self.started[i], i)

    def compare(self, found, at, first, last, place):
        """One block: some version of it, whole if nothing was under way."""
        found = found[at * BLOCK:(at + 1) * BLOCK]
        places = {struct.unpack_from('<Q', found, i)[0] for i in range(0, BLOCK, 16)}
        versions = {struct.unpack_from('<Q', found, i)[0] for i in range(8, BLOCK, 16)}
        assert versions <= set(range(first, last + 1)), (
            f'{self.path}, block {at}: version {first} was synced, {last} begun, it has {versions}')
        assert places <= {self.base + place, *([0] if first == 0 else [])}, f'{self.path}: block of {places}'


def cut(mount, loop, kind, flush, seed):
    rng = random.Random(seed)
    making = [gevent.spawn(Writer, mount, i, rng, flush) for i in range(WRITERS)]
    gevent.joinall(making, raise_error=True)
    writers = [writer.value for writer in making]
    running = [gevent.spawn(writer.run) for writer in writers]
    gevent.sleep(rng.uniform(0.01, 0.2))
    while sum(sum(writer.durable) for writer in writers) < WRITERS:
        gevent.sleep(0.005)             # a busy machine has written nothing by then
    folder = os.open(mount, os.O_RDONLY)
    for writer in writers:              # what is acknowledged from here on does not count
        writer.is_off = True
    fcntl.ioctl(folder, SHUTDOWN, NOLOGFLUSH)
    os.close(folder)
    gevent.joinall(running, raise_error=True)
    for writer in writers:
        writer.file.close()
    retry('umount', mount)
    run('mount', '-t', kind, loop, mount)   # the journal is replayed
    for writer in writers:
        writer.check()
        os.unlink(writer.path)
    return 1


@contextlib.contextmanager
def rounds(folder, type, no_flush):
    disk, mount = os.path.join(folder, 'disk'), os.path.join(folder, 'mnt')
    os.mkdir(mount)
    with open(disk, 'wb') as file:
        file.truncate(SIZE[type] * MIB)
    with contextlib.ExitStack() as stack:
        loop = run('losetup', '--direct-io=on', '-f', '--show', disk).strip()
        stack.callback(retry, 'losetup', '-d', loop)
        run(f'mkfs.{type}', '-q', loop)
        run('mount', '-t', type, loop, mount)
        stack.callback(run, 'umount', '-l', mount)      # at Ctrl-C the writers are at work still
        yield lambda seed: cut(mount, loop, type, not no_flush, seed)


if __name__ == '__main__':
    sys.exit(long.main(
        'tests.faults.power_cut', __doc__, 'cuts', 1000, rounds,
        type={'choices': list(SIZE), 'default': 'ext4'},
        no_flush={'action': 'store_true', 'help': 'sync nothing: show that this can fail'}))
