"""What a buffered read of 4 KiB costs beside os and gevent: a hit in time, a miss in processor time."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time

import gevent

import greenaio.os
from benchmarks.contest import Bar, Contest
from greenaio import File

HITS, MISSES, BLOCK = 20000, 2000, 4096


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def hits(call):
    for _ in range(100):
        call()
    began = time.perf_counter()
    for _ in range(HITS):
        call()
    return {'us': (time.perf_counter() - began) / HITS * 1e6}


def misses(fd, call):
    """16 greenlets at a time, each read somewhere that nobody has read before."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    offsets = iter(range(0, MISSES * 4 * BLOCK, 4 * BLOCK))
    began = cpu()

    def work():
        for offset in offsets:
            call(offset)

    gevent.joinall([gevent.spawn(work) for _ in range(16)], raise_error=True)
    return {'cpu_us': (cpu() - began) / MISSES * 1e6}


@contextlib.contextmanager
def reads(options):
    """Buffered reads of 4 KiB: a hit, a miss."""
    with tempfile.NamedTemporaryFile(dir=options.folder) as made:
        for _ in range(64):
            made.write(os.urandom(1 << 20))
        made.flush()
        os.fsync(made.fileno())
        fd = os.open(made.name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        file = File.from_fd(fd)
        pool = gevent.get_hub().threadpool

        def cached(call):
            os.pread(fd, 1 << 20, 0)
            return hits(call)

        yield [
            Contest('a hit', {
                'os.pread': lambda: cached(lambda: os.pread(fd, BLOCK, 0)),
                'File.pread': lambda: cached(lambda: file.pread(BLOCK, 0)),
                'greenaio.os.pread': lambda: cached(lambda: greenaio.os.pread(fd, BLOCK, 0)),
            }, bars=(Bar(1.2, 'us', 'File.pread', 'os.pread', most=True),
                     Bar(1.35, 'us', 'greenaio.os.pread', 'os.pread', most=True))),
            Contest('a miss', {
                'threadpool': lambda: misses(fd, lambda offset: pool.apply(os.pread, (fd, BLOCK, offset))),
                'File.pread': lambda: misses(fd, lambda offset: file.pread(BLOCK, offset)),
                'greenaio.os.pread': lambda: misses(fd, lambda offset: greenaio.os.pread(fd, BLOCK, offset)),
            })]
        os.close(fd)


IMPORTED = '''
import time, gevent, gevent.hub, gevent.threadpool
began = time.perf_counter()
import greenaio
print((time.perf_counter() - began) * 1e3)
'''


@contextlib.contextmanager
def start(options):
    """Importing greenaio after gevent."""
    def measure():
        command = [sys.executable, '-c', IMPORTED]
        return {'ms': min(float(subprocess.check_output(command, env=env)) for _ in range(5))}

    # Compiled by the first of each five, as on the second start of any program.
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    with tempfile.TemporaryDirectory() as env['PYTHONPYCACHEPREFIX']:
        yield [Contest('import', {'greenaio, after gevent': measure},
                       bars=(Bar(15, 'ms', 'greenaio, after gevent', most=True),))]
