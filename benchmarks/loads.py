"""4 KiB requests of every kind, through greenaio and beside it: the ways of ``python -m greenaio bench``."""

import contextlib
import os
import tempfile
from functools import partial

from benchmarks.contest import Bar, Contest
from greenaio._commands import bench

SIZE = 256 << 20                # bytes
POLL_US = 100
ENGINES = ('fio', 'fio:io_uring', 'qemu-img', 'qemu-img:threads', 'qemu-img:io_uring', 'threadpool')
ASYNCIO = ('caio', 'aiofiles')


def figures(load, depth, way):
    load.prepare()
    found = bench.WAYS[way](load, depth)
    gap, latency = found['hub_gap_ms'], found['latency_us']
    return {'iops': found['iops'], 'cpu_us': found['cpu_us'],
            **({'p50_us': latency['p50'], 'p99_us': latency['p99']} if latency else {}),
            **({'gap_p99_ms': gap['p99'], 'gap_max_ms': gap['max']} if gap else {})}


def contest(load, depth, ways, bars=(), what=''):
    bench._greenaio_poll.limit = POLL_US    # type: ignore[attr-defined]
    return Contest(f'{what or load.rw}, depth {depth:,}',
                   {way: partial(figures, load, depth, way) for way in ways if bench._installed(way)},
                   depth, tuple(bars))


@contextlib.contextmanager
def made_file(folder):
    with tempfile.NamedTemporaryFile(prefix='greenaio-bench-', dir=folder) as file:
        bench._fill(file.fileno(), SIZE)
        yield lambda rw, seconds, *buffered: bench.Load(file.name, SIZE, 4096, rw, seconds, *buffered)


def beside_fio(iops, cpu=None):
    yield Bar(iops, 'iops', 'greenaio', 'fio')
    if cpu:
        yield Bar(cpu, 'cpu_us', 'greenaio', 'fio', most=True)


WANTED = {1: (0.95,), 4: (0.95,), 16: (0.95, 1.2), 64: (1.0, 1.0), 256: (1.0, 1.0)}


@contextlib.contextmanager
def disk(options):
    """A disk, O_DIRECT, random reads."""
    with made_file(options.folder) as load:
        yield [contest(load('randread', options.seconds, False), depth,
                       ('greenaio', *(['greenaio+poll'] if depth <= 4 else []), *ENGINES),
                       [*beside_fio(*WANTED[depth]),
                        *([Bar(1.3, 'iops', 'greenaio+poll', 'fio')] if depth == 1 else [])])
               for depth in WANTED]


@contextlib.contextmanager
def kinds(options):
    """A disk, O_DIRECT, writing and in order."""
    with made_file(options.folder) as load:
        yield [contest(load(rw, options.seconds, False), depth, ('greenaio', *ENGINES, 'fileobject'))
               for rw in ('randwrite', 'read', 'write') for depth in (1, 16, 64)]


@contextlib.contextmanager
def memory(options):
    """Memory (tmpfs), O_DIRECT, random reads: everything completes inside io_submit."""
    with made_file(options.memory) as load:
        bars = {1: [Bar(1.3, 'iops', 'greenaio', 'qemu-img')],
                64: [Bar(1.2, 'iops', 'greenaio', 'qemu-img'), Bar(0.6, 'iops', 'greenaio', 'fio:batch'),
                     Bar(0.8, 'iops', 'greenaio:bytes', 'greenaio')]}
        yield [contest(load('randread', options.seconds, False), depth,
                       ('greenaio', 'greenaio:bytes', 'qemu-img', 'fio', 'fio:batch'), bars[depth])
               for depth in bars]


@contextlib.contextmanager
def many(options):
    """A disk, O_DIRECT, random reads by many greenlets."""
    with made_file(options.folder) as load:
        yield [Contest('randread, many greenlets', {
            f'{depth:,}': partial(figures, load('randread', options.seconds, False), depth, 'greenaio')
            for depth in (256, 1000, 10000)}, bars=(Bar(0.95, 'iops', '10,000', '256'),))]


@contextlib.contextmanager
def buffered(options):
    """The page cache: cold, warm, and files that grow."""
    with made_file(options.folder) as load:
        cold, warm = (load('randread', options.seconds, True, cache) for cache in ('cold', 'warm'))
        ways = ('greenaio', 'blocking', 'threadpool', 'fileobject', *ASYNCIO)
        yield [
            *[contest(cold, depth, ways, [
                Bar(3, 'iops', 'greenaio', 'threadpool'),
                Bar(1 / 3, 'cpu_us', 'greenaio', 'threadpool', most=True)] if depth == 64 else [], 'cold')
              for depth in (1, 16, 64)],
            *[contest(warm, depth, ways, what='warm') for depth in (1, 16, 64)],
            contest(load('append', options.seconds, False), 16, ('greenaio', 'blocking', 'threadpool'))]


@contextlib.contextmanager
def sync(options):
    """A 4 KiB overwrite and fdatasync by each of 64 greenlets, on a file each."""
    import resource
    import time

    import gevent

    from greenaio import File, aligned_buffer
    pool = gevent.get_hub().threadpool
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.ExitStack() as stack:
        paths = [os.path.join(folder, str(i)) for i in range(64)]
        for path in paths:
            with open(path, 'wb') as file:
                bench._fill(file.fileno(), 1 << 20)
        direct = [stack.enter_context(File(path, os.O_RDWR | os.O_DIRECT)) for path in paths]
        plain = [stack.enter_context(File(path, os.O_RDWR)) for path in paths]
        data = aligned_buffer(4096)

        def by(one, files):
            def measure():
                end, count = time.perf_counter() + options.seconds, 0

                def work(file):
                    nonlocal count
                    offset = 0
                    while time.perf_counter() < end:
                        one(file, offset)
                        offset = (offset + 4096) % (1 << 20)
                        count += 1

                before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                gevent.joinall([gevent.spawn(work, file) for file in files], raise_error=True)
                seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                return {'iops': count / seconds, 'cpu_us': cpu / count * 1e6}
            return measure

        def cooperative(file, offset):
            file.pwrite(data, offset)
            file.fdatasync()

        def blocking(fd, offset):
            os.pwrite(fd, data, offset)
            os.fdatasync(fd)

        def pooled(file, offset):
            pool.apply(blocking, (file.fileno(), offset))

        yield [Contest('4 KiB and fdatasync', {
            'greenaio, O_DIRECT': by(cooperative, direct), 'greenaio, buffered': by(cooperative, plain),
            'threadpool, O_DIRECT': by(pooled, direct), 'threadpool, buffered': by(pooled, plain),
        }, bars=(Bar(5, 'iops', 'greenaio, O_DIRECT', 'threadpool, buffered'),
                 Bar(5, 'iops', 'greenaio, buffered', 'threadpool, buffered')))]
