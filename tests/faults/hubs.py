"""HUBS: ``python -m tests.faults.hubs --cycles 10000``.

A cycle is a thread with a hub of its own, which reads, or not, and destroys its hub, or forgets to, or has
two of them; with I/O queued, in flight and with threads at that moment, or without. Of all these nothing
stays: no fd, no context of native AIO, no thread, no driver; and none disturbs another. What is suspended
when its thread ends, greenlet keeps for ever, and its memory: every hundred cycles have their own process.
"""

import contextlib
import functools
import os
import random
import subprocess
import sys
import threading

import gevent

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from greenaio._core import pools as _pools
from tests.faults import long
from tests.support.disks import MIB, pattern
from tests.support.processes import contexts

PAGE = 4096
CONTENT = pattern(MIB)
SIDE_BY_SIDE = 4                # threads of a round
EACH = 100                      # cycles of a process


class Place:
    def __init__(self, folder):
        path = os.path.join(folder, 'data')
        with open(path, 'wb') as file:
            file.write(CONTENT)
            os.fsync(file.fileno())
        self.direct, self.cold = File(path, os.O_RDONLY | os.O_DIRECT), File(path, os.O_RDONLY)
        os.posix_fadvise(self.cold.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def close(self):
        self.direct.close()
        self.cold.close()

    def read(self, file, at):
        memory = [aligned_buffer(PAGE), bytearray(PAGE)]
        assert file.pread(PAGE, at) == CONTENT[at:at + PAGE]
        assert file.preadv(memory, at) == 2 * PAGE and b''.join(memory) == CONTENT[at:at + 2 * PAGE]

    def readers(self, rng):
        return [gevent.spawn(self.read, rng.choice((self.direct, self.cold)), rng.randrange(255) * PAGE)
                for _ in range(rng.randrange(1, 12))]


class Cycle(threading.Thread):
    """What one thread does: told by its rng, so that it does the same again."""

    def __init__(self, place, seed):
        super().__init__()
        self.place, self.rng = place, random.Random(seed)
        self.error = self.forgotten = None
        self.start()

    def run(self):
        try:
            for last in (False, True)[self.rng.random() < 0.7:]:
                self.one_hub(last)
        except BaseException as error:
            self.error = error

    def one_hub(self, may_forget):
        place, rng, hub = self.place, self.rng, gevent.get_hub()
        if rng.random() < 0.8:
            gevent.joinall(place.readers(rng), raise_error=True)
        if rng.random() < 0.6:
            place.readers(rng)
        gevent.sleep(0) if rng.random() < 0.7 else gevent.sleep(0.0003)
        if may_forget and rng.random() < 0.3:
            self.forgotten = hub
        else:
            hub.destroy(destroy_loop=True)


def counts():
    return {'fds': len(os.listdir('/proc/self/fd')), 'contexts': contexts(),
            'drivers': len(_hub.all_drivers()),
            'threads': len(os.listdir('/proc/self/task')) - sum(pool.threads for pool in _pools.pools())}


@contextlib.contextmanager
def rounds(folder, here=False):
    if here:
        with rounds_here(folder) as one_round:
            yield one_round
    else:
        yield functools.partial(a_process, folder)


def a_process(folder, seed):
    done = subprocess.run([sys.executable, '-m', 'tests.faults.hubs', '--here', '--cycles', str(EACH),
                           '--seed', str(seed * EACH), '--folder', folder], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return EACH


@contextlib.contextmanager
def rounds_here(folder):
    with contextlib.closing(Place(folder)) as place:
        place.read(place.direct, 0)     # what this thread has and keeps
        before = counts()

        def one_round(seed):
            rng = random.Random(seed)
            os.posix_fadvise(place.cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cycles = [Cycle(place, rng.random()) for _ in range(SIDE_BY_SIDE)]
            while any(cycle.is_alive() for cycle in cycles):
                place.read(place.direct, rng.randrange(255) * PAGE)     # this hub goes on meanwhile
            for cycle in cycles:
                cycle.join()
                if cycle.forgotten:
                    cycle.forgotten.loop.destroy()      # what gevent would keep for ever
                if cycle.error:
                    raise cycle.error
            for _ in range(1000):       # native threads end what was in flight
                if counts() == before:
                    break
                gevent.sleep(0.005)
            assert counts() == before, f'{before} at first, {counts()} now'
            _hub.get_driver().engine._check()
            return SIDE_BY_SIDE

        yield one_round


if __name__ == '__main__':
    sys.exit(long.main('tests.faults.hubs', __doc__, 'cycles', 10_000, rounds,
                       here={'action': 'store_true', 'help': 'in this process'}))
