"""python benchmarks/buffered.py [PATH]: what a buffered read of 4 KiB costs beside os and gevent.

Ways take turns in each round; medians. PATH is a file on a disk of at least 64 MiB, by default one made here.
"""

import os
import resource
import statistics
import sys
import tempfile
import time

import gevent

import greenaio.os
from greenaio import File

ROUNDS, HITS, MISSES, BLOCK = 15, 20000, 2000, 4096


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def hits(call):
    for _ in range(100):
        call()
    began = time.perf_counter()
    for _ in range(HITS):
        call()
    return (time.perf_counter() - began) / HITS * 1e6


def misses(call, forget):
    """CPU µs per read, 16 greenlets at a time, each read somewhere that nobody has read before."""
    forget()
    offsets = iter(range(0, MISSES * 4 * BLOCK, 4 * BLOCK))
    began = cpu()

    def work():
        for offset in offsets:
            call(offset)

    gevent.joinall([gevent.spawn(work) for _ in range(16)], raise_error=True)
    return (cpu() - began) / MISSES * 1e6


def show(title, ways, measure, base):
    taken = {name: [] for name in ways}
    for turn in range(ROUNDS):
        names = list(ways)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            taken[name].append(measure(ways[name]))
    print(title)
    for name, values in taken.items():
        ratio = statistics.median(value / other for value, other in zip(values, taken[base]))
        print(f'  {name:<16} {statistics.median(values):8.2f} µs   {ratio:5.2f} × {base}')


def main():
    with tempfile.NamedTemporaryFile(dir='/var/tmp') as made:
        path = sys.argv[1] if len(sys.argv) > 1 else made.name
        if path == made.name:
            for _ in range(64):
                made.write(os.urandom(1 << 20))
            made.flush()
            os.fsync(made.fileno())
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        file = File.from_fd(fd)
        pool = gevent.get_hub().threadpool
        os.pread(fd, 1 << 20, 0)

        def forget():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        show('a hit, time', {
            'os': lambda: os.pread(fd, BLOCK, 0),
            'greenaio.os': lambda: greenaio.os.pread(fd, BLOCK, 0),
            'File': lambda: file.pread(BLOCK, 0),
        }, hits, 'os')
        show('a miss, CPU', {
            'threadpool': lambda offset: pool.apply(os.pread, (fd, BLOCK, offset)),
            'greenaio.os': lambda offset: greenaio.os.pread(fd, BLOCK, offset),
            'File': lambda offset: file.pread(BLOCK, offset),
        }, lambda call: misses(call, forget), 'threadpool')
        os.close(fd)


if __name__ == '__main__':
    main()
