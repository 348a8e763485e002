"""KILL and UAF: ``python -m tests.faults.kills --kills 1000000 [--in-flight]``.

Greenlets read and write, O_DIRECT, vectored, through a cold cache. Each is killed, timed out or thrown into:
before it begins, while its request is queued, in the kernel's or a thread's hands, or done but not delivered.
Then its memory: if nothing holds it any more, it is filled anew, and nobody may write there; if it is held,
it is dropped, and memory of its size that comes instead is nobody else's. Nor may the disk ever show what was
filled in. With --in-flight all are struck as soon as they are submitted, and only those count that the
kernel or a thread had.
"""

import collections
import contextlib
import functools
import mmap
import os
import random
import sys
import time

import gevent
from gevent import GreenletExit

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from tests.faults import long
from tests.support.disks import MIB, pattern

VICTIMS = 256                   # of a round
PAGE = 4096
FEW = 8                         # as many as a disk does not do at once
SLOT = 3 * PAGE                 # what one writer may write
MINE = 0xee                     # what is filled in afterwards, and stands in no file
PATIENCE = (0, 0.00003, 0.0001, 0.0003, 0.001, 0.01)    # seconds
BUSY = 0.0002                   # seconds the loop stands still, so that the disk is ahead of it


class Struck(BaseException):
    """What is thrown, as a kill is."""


class World:
    """The files, what is in them, and how many ended where."""

    def __init__(self, folder):
        self.content = pattern(MIB)
        paths = [os.path.join(folder, name) for name in ('read', 'cold', 'written')]
        for path in paths:
            with open(path, 'wb') as file:
                file.write(self.content if path != paths[2] else bytes(VICTIMS * SLOT))
                os.fsync(file.fileno())
        self.direct = File(paths[0], os.O_RDONLY | os.O_DIRECT)
        self.cold = File(paths[1], os.O_RDONLY)
        self.written = File(paths[2], os.O_RDWR | os.O_DIRECT)
        os.posix_fadvise(self.cold.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.memory = mmap.mmap(-1, VICTIMS * SLOT)     # not of greenaio, by which it is looked at
        self.there = self.look()
        self.ends = collections.Counter()
        self.driver = _hub.get_driver()
        self.loop = gevent.get_hub().loop

    def waiting(self):
        engine = self.driver.engine
        return len(engine.pending) + sum(len(share.held) for share in engine.shares.values())

    def look(self):
        """What is on the disk, past the page cache: what is in it goes by threads."""
        assert os.preadv(self.written.fileno(), [self.memory], 0) == len(self.memory)
        return bytes(self.memory)

    def struck(self, in_flight):
        """How many were; those *in_flight* alone, if so."""
        wanted = ('in flight', 'with a thread') if in_flight else self.ends
        return sum(self.ends[where] for where in wanted)

    def close(self):
        for file in (self.direct, self.cold, self.written):
            file.close()


class Victim:
    """One operation, its memory, and its end."""

    def __init__(self, world, rng, slot, others):
        self.world, self.slot, self.others = world, slot, others
        self.perform = rng.choice((self.pread, self.preadv, self.cold, self.pwrite, self.pwritev))
        self.at = rng.randrange(0, MIB - SLOT, PAGE)
        self.nbytes = PAGE * rng.randrange(1, 4)
        self.new = rng.randrange(1, 200)
        self.patience = rng.choice(PATIENCE) if rng.random() < 0.3 else None
        self.drops, self.goes_on, self.strikes = (rng.random() < p for p in (0.5, 0.3, 0.1))
        self.memory = []                # blocks: two views each, of which greenaio gets the first
        self.ends = []
        self.struck_at = lambda: 'timed out'
        self.began = False
        self.greenlet = gevent.spawn(self.run)
        others[self.greenlet] = self

    def views(self, n, fill=None):
        for _ in range(n):
            view = aligned_buffer(self.nbytes // n // 512 * 512)
            if fill:
                view[:] = bytes([fill]) * len(view)
            self.memory.append((view, memoryview(view.obj)))
        return [view for view, _ in self.memory]

    def pread(self):
        assert self.world.direct.pread(self.nbytes, self.at) == self.read()

    def preadv(self, file=None):
        views = self.views(3)
        assert (file or self.world.direct).preadv(views, self.at) == sum(map(len, views))
        assert b''.join(views) == self.read(sum(map(len, views)))

    def cold(self):
        if self.drops:
            assert self.world.cold.pread(self.nbytes, self.at) == self.read()
        else:
            self.preadv(self.world.cold)

    def pwrite(self, n=1):
        views = self.views(n, self.new)
        self.nbytes = sum(map(len, views))
        if n == 1:
            assert self.world.written.pwrite(views[0], self.slot * SLOT) == self.nbytes
        else:
            assert self.world.written.pwritev(views, self.slot * SLOT) == self.nbytes

    def pwritev(self):
        self.pwrite(2)

    def read(self, n=None):
        return self.world.content[self.at:self.at + (n or self.nbytes)]

    def run(self):
        self.began = True
        try:
            with gevent.Timeout(self.patience):
                self.perform()
            self.ends.append('done')
        except (gevent.Timeout, GreenletExit, Struck):
            self.ends.append('struck')
        self.others.pop(self.greenlet, None)
        if self.ends[-1] == 'struck':
            self.world.ends[self.struck_at()] += 1
            self.take_memory()
        elif self.strikes and self.others:      # both may be in one drain pass
            back = self.world.loop.run_callback(self.greenlet.switch)
            next(reversed(self.others.values())).strike()
            back.stop()                         # unless it was that which brought us here
        if self.goes_on:                        # and gets what is its own, not what it was struck out of
            self.at = (self.at + PAGE) % (MIB - SLOT)
            self.pread()

    def strike(self):
        """End it here and now; tell where that found it."""
        engine, world = self.world.driver.engine, self.world
        self.others.pop(self.greenlet)
        if not self.began:
            world.ends['before'] += 1
            self.greenlet.throw(GreenletExit)
            return
        waiting, ready, lent = world.waiting(), len(engine.ready), len(engine.lent)
        self.struck_at = lambda: (
            'done' if len(engine.ready) < ready else 'queued' if world.waiting() < waiting
            else 'with a thread' if self.perform == self.cold and lent else 'in flight')
        self.greenlet.throw(Struck)

    def take_memory(self):
        """It is ours again, or, if the kernel has it still, what comes in its place is."""
        for i, (view, ours) in enumerate(self.memory):
            try:
                view.release()
            except BufferError:                 # held, as it has to be
                if not self.drops:
                    continue
                ours = aligned_buffer(len(view))
            ours[:] = bytes([MINE]) * len(ours)
            self.memory[i] = None, ours
        if not self.memory:                     # greenaio's own was in its place
            ours = aligned_buffer(self.nbytes)
            ours[:] = bytes([MINE]) * self.nbytes
            self.memory.append((None, ours))

    def check(self, found):
        if not self.began:
            assert isinstance(self.greenlet.value, GreenletExit)
            return
        assert len(self.ends) == 1, f'ended {self.ends}'
        assert self.greenlet.successful(), self.greenlet.exception
        if self.ends == ['struck']:
            for view, ours in self.memory:
                if view is None:
                    assert bytes(ours) == bytes([MINE]) * len(ours), 'written by somebody after the kill'
                else:
                    view.release()              # nobody holds it now
        if self.perform in (self.pwrite, self.pwritev):
            mine = slice(self.slot * SLOT, (self.slot + 1) * SLOT)
            self.check_slot(found[mine], self.world.there[mine])

    def check_slot(self, found, old):
        if found != bytes([self.new]) * self.nbytes + old[self.nbytes:]:
            assert self.ends == ['struck'], 'a write that was acknowledged is not there'
            assert found[self.nbytes:] == old[self.nbytes:], 'beyond what was to be written'
            assert set(found) <= {*old, self.new}, 'what is on the disk nobody wrote'


def strike_later(world, rng, victims, times):
    """In the hub, now and some more times in this turn: its end, where all is submitted, is between them."""
    if rng.random() < 0.02:
        time.sleep(BUSY)
    for _ in range(rng.randrange(4)):
        if victims:
            rng.choice(list(victims.values())[-16:]).strike()
    if times:
        world.loop.run_callback(strike_later, world, rng, victims, times - 1)


def strike_all(victims):
    for victim in list(victims.values()):
        if victim.greenlet in victims:
            victim.strike()


def one_round(world, in_flight, seed):
    rng, whims, began = random.Random(seed), random.Random(~seed), world.struck(in_flight)
    engine, victims, everyone = world.driver.engine, {}, []
    os.posix_fadvise(world.cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for slot in range(VICTIMS):
        everyone.append(Victim(world, rng, slot, victims))
        if in_flight:
            if slot % FEW == FEW - 1:
                gevent.sleep(0)         # the turn at whose end they are submitted; then comes this:
                world.loop.run_callback(strike_all, victims)
                gevent.sleep(0)
            continue
        if whims.random() < 0.1:
            world.loop.run_callback(strike_later, world, whims, victims, whims.randrange(6))
        if whims.random() < 0.03:
            gevent.sleep(whims.choice((0, 0.0003)))
    while victims:
        if whims.random() < 0.1:
            time.sleep(BUSY)
        world.loop.run_callback(strike_later, world, whims, victims, whims.randrange(6))
        gevent.sleep(whims.choice((0, 0, 0.0005)))
    engine._check()
    gevent.joinall([victim.greenlet for victim in everyone])
    while len(engine.in_flight) or len(engine.lent) or len(engine.ready):   # those that nobody waits for
        gevent.sleep(0.0005)
    engine._check()
    assert world.waiting() == world.driver.waiting == 0
    assert engine.submitted == engine.completed
    found = world.look()
    for victim in everyone:
        victim.check(found)
    world.there = found
    return world.struck(in_flight) - began


@contextlib.contextmanager
def rounds(folder, in_flight=False):
    world = World(folder)
    try:
        yield functools.partial(one_round, world, in_flight)
    finally:
        world.close()
        print(dict(world.ends), file=sys.stderr)


if __name__ == '__main__':
    sys.exit(long.main('tests.faults.kills', __doc__, 'kills', 1_000_000, rounds,
                       in_flight={'action': 'store_true', 'help': 'count those alone'}))
