"""FSX: ``python -m tests.faults.fsx --ops 10000000``.

Up to 64 greenlets read, write, append, truncate and fsync one small file, each in ranges that are its own at
the time, through fds with O_DIRECT and without, or both at once; beside them is a model, the file's bytes.
Offsets and lengths are of any alignment. Every read is compared, and the whole file now and then; around
every buffer there are bytes that nobody may touch.
"""

import contextlib
import itertools
import os
import random
import sys

import gevent

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from tests.faults import long

MOST = 512 * 1024               # bytes of the file
SECTOR = 4096                   # what is shared by two fds, only one may write at a time
OPS = 2048                      # of a round
CANARY = b'\xa5' * 64
NOISE = random.Random(1).randbytes(2 * MOST)


class Memory:
    """Buffers cut out of larger ones, whose rest must stay as it is."""

    def __init__(self, rng, nbytes, data=None):
        count = rng.choice((1, 1, 2, 3))
        sizes = [nbytes // count] * (count - 1)
        sizes.append(nbytes - sum(sizes))
        before = rng.choice((len(CANARY), 512, SECTOR))     # and so aligned, or not
        self.all, self.buffers, at = [], [], 0
        for size in sizes:
            whole = aligned_buffer(before + size + len(CANARY))
            whole[before - len(CANARY):before] = whole[before + size:] = CANARY
            self.all.append((whole, before, size))
            self.buffers.append(whole[before:before + size])
            if data is not None:
                self.buffers[-1][:] = data[at:at + size]
            at += size

    def check(self):
        for whole, before, size in self.all:
            assert whole[before - len(CANARY):before] == CANARY == whole[before + size:], 'a canary is dead'


class Model:
    """The file, its fds, and what is in it."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'data')
        self.bytes = bytearray()
        flags = os.O_RDWR | os.O_CREAT
        self.direct, self.cached = File(self.path, flags | os.O_DIRECT), File(self.path, flags)

    def close(self):
        self.direct.close()
        self.cached.close()

    def write(self, file, rng, at, n):
        start = rng.randrange(MOST)
        data = NOISE[start:start + n]
        if rng.random() < 0.4:
            assert file.pwrite(data, at) == n
        else:
            memory = Memory(rng, n, data)
            assert file.pwritev(memory.buffers, at) == n
            memory.check()
        self.put(at, data)

    def put(self, at, data):
        if at > len(self.bytes):
            self.bytes.extend(bytes(at - len(self.bytes)))
        self.bytes[at:at + len(data)] = data

    def read(self, file, rng, at, n):
        if rng.random() < 0.5:
            found = file.pread(n, at)
        else:
            memory = Memory(rng, n)
            got = file.preadv(memory.buffers, at)
            assert 0 <= got <= n, f'{got} of {n} bytes'
            memory.check()
            found = b''.join(memory.buffers)[:got]
        wanted = self.bytes[at:at + n]
        if found != wanted:
            first = [a == b for a, b in zip(found, wanted)].index(False) if len(found) == len(wanted) else '?'
            raise AssertionError(f'read of {n} at {at}: {len(found)} bytes, not {len(wanted)}; byte {first}')

    def truncate(self, rng):
        size = rng.randrange(MOST + 1)
        os.ftruncate(self.cached.fileno(), size)
        self.put(size, b'')
        del self.bytes[size:]

    def check(self):
        with open(self.path, 'rb') as file:
            assert file.read() == self.bytes, 'the file is not what was written'


def one_round(model, seed):
    rng = random.Random(seed)
    depth, mode = rng.choice((1, 2, 4, 8, 16, 32, 64)), rng.choice(('direct', 'cached', 'mixed'))
    whole = rng.random() < 0.5          # only whole sectors
    most = rng.choice((SECTOR, 4 * SECTOR, 16 * SECTOR))
    numbers = itertools.count()
    share = MOST // depth // SECTOR * SECTOR
    os.ftruncate(model.cached.fileno(), 0)
    model.bytes.clear()

    def work(number, own):
        """Nobody else is in these sectors, nor changes the size meanwhile."""
        base = number * share
        while next(numbers) < OPS // 8:
            file = {'direct': model.direct, 'cached': model.cached,
                    'mixed': own.choice((model.direct, model.cached))}[mode]
            n = own.randrange(1, min(most, share) + 1)
            at = base + own.randrange(share - n + 1)
            if whole:
                at -= at % SECTOR
                n = (n + SECTOR - 1) // SECTOR * SECTOR
            dice = own.random()
            if dice < 0.02:
                own.choice((file.fsync, file.fdatasync))()
            elif dice < 0.5 and at + n <= len(model.bytes):
                model.write(file, own, at, n)
            else:
                model.read(file, own, at, n)

    for _ in range(8):                  # between them one greenlet changes the size
        for _ in range(rng.randrange(4)):
            file = rng.choice((model.direct, model.cached))
            if rng.random() < 0.4:
                model.truncate(rng)
            elif len(model.bytes) < MOST:
                n = rng.randrange(1, min(4 * most, MOST - len(model.bytes)) + 1)
                model.write(file, rng, len(model.bytes), n)
            model.read(file, rng, max(0, len(model.bytes) - most), 2 * most)
        if len(model.bytes) < MOST // 2 and rng.random() < 0.5:
            model.write(rng.choice((model.direct, model.cached)), rng, MOST - most, most)   # past a hole
        numbers = itertools.count()
        workers = [gevent.spawn(work, i, random.Random(rng.random())) for i in range(depth)]
        gevent.joinall(workers, raise_error=True)
    model.check()
    engine = _hub.get_driver().engine
    engine._check()
    assert len(engine.in_flight) == len(engine.lent) == 0 and engine.submitted == engine.completed
    return OPS


@contextlib.contextmanager
def rounds(folder):
    with contextlib.closing(Model(folder)) as model:
        yield lambda seed: one_round(model, seed)


if __name__ == '__main__':
    sys.exit(long.main('tests.faults.fsx', __doc__, 'ops', 10_000_000, rounds))
