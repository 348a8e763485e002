"""FORK: ``python -m tests.faults.forks --forks 10000``.

The process forks with requests queued, in flight, with threads, done but not delivered; in its main greenlet
or in a drain pass. The child idles in its loop, does I/O of its own, waits for the parent's greenlets, or
exits, at once or as Python does. Who waited gets ECANCELED in the child, or has what was delivered before.
The parent gets all its data, and of the child nothing but its status.
"""

import contextlib
import errno
import functools
import os
import random
import sys
import time

import gevent

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from tests.faults import long
from tests.support.disks import MIB, pattern

PAGE = 4096
CONTENT = pattern(MIB)


class Family:
    """The parent's files, its readers, and its children."""

    def __init__(self, folder, rng):
        self.rng = rng
        self.path = os.path.join(folder, 'data')
        with open(self.path, 'wb') as file:
            file.write(CONTENT)
            os.fsync(file.fileno())
        self.direct, self.cold = (self.open(flags) for flags in (os.O_DIRECT, 0))
        os.posix_fadvise(self.cold.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def open(self, flags):
        # Not File(path): under libuv gevent's own thread pool may hang a child in uv_loop_fork.
        return File.from_fd(os.open(self.path, os.O_RDONLY | flags), closefd=True)

    def close(self):
        self.direct.close()
        self.cold.close()

    def read(self, file, at, n):
        """A read into memory of greenaio's, or of one's own that no child sees."""
        if n % (2 * PAGE):
            assert file.pread(n, at) == CONTENT[at:at + n], f'wrong at {at}'
        else:
            memory = [aligned_buffer(n // 2), aligned_buffer(n // 2)]
            assert file.preadv(memory, at) == n and b''.join(memory) == CONTENT[at:at + n], f'wrong at {at}'
        return n

    def readers(self, count):
        return [gevent.spawn(self.read, self.rng.choice((self.direct, self.direct, self.cold)),
                             self.rng.randrange(MIB // PAGE - 4) * PAGE, PAGE * self.rng.randrange(1, 5))
                for _ in range(count)]

    def fork(self, inherited):
        """A child; its pid."""
        what = self.rng.choice((self.idle, self.work, self.inherit, self.exit, self.quit))
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            gevent.reinit()
            gevent.get_hub().exception_stream = None    # who inherited a request fails, and would be printed
            with gevent.Timeout(60):
                what(inherited)
            status = 0
        except SystemExit:
            raise                       # the interpreter's own end
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(status)

    def idle(self, inherited):
        gevent.sleep(0.002)

    def work(self, inherited):
        gevent.joinall(self.readers(16), raise_error=True)
        _hub.get_driver().engine._check()

    def inherit(self, inherited):
        gevent.joinall(inherited, timeout=30)
        for reader in inherited:
            assert reader.ready(), 'waits for ever in the child'
            if not reader.successful():
                assert getattr(reader.exception, 'errno', None) == errno.ECANCELED, reader.exception
        self.work(inherited)

    def exit(self, inherited):
        os._exit(0)

    def quit(self, inherited):
        sys.exit(0)


def wait_for(pid):
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f'a child ended with {status}'
            return
        gevent.sleep(0.001)


def one_round(family, seed):
    rng = family.rng
    rng.seed(seed)
    engine = _hub.get_driver().engine
    os.posix_fadvise(family.cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    readers, parent, pids = family.readers(rng.randrange(1, 96)), os.getpid(), []

    def fork_in_midst():
        """Its first half is in both processes; the child's goes no further."""
        family.read(family.direct, 0, PAGE)
        others = [reader for reader in readers if reader is not gevent.getcurrent()]
        pids.append(family.fork(others))

    in_midst = rng.random() < 0.3
    if in_midst:
        readers.insert(0, gevent.spawn(fork_in_midst))
    for _ in range(rng.randrange(3)):
        gevent.sleep(0)
    if rng.random() < 0.2:
        time.sleep(0.0003)              # the disk is ahead of the loop
    if not in_midst:
        pids.append(family.fork(readers))
    gevent.joinall(readers)
    if os.getpid() != parent:
        gevent.sleep(long.PATIENCE)     # the child's copy of this greenlet, while another is at work
    for reader in readers:
        reader.get()
    for pid in pids:
        wait_for(pid)
    engine._check()
    assert len(engine.in_flight) == len(engine.lent) == 0
    assert engine.submitted == engine.completed
    return len(pids)


@contextlib.contextmanager
def rounds(folder):
    with contextlib.closing(Family(folder, random.Random())) as family:
        yield functools.partial(one_round, family)


if __name__ == '__main__':
    sys.exit(long.main('tests.faults.forks', __doc__, 'forks', 10_000, rounds))
