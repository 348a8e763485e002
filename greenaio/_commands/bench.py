"""Measure a disk through greenaio and by other ways, in one run.

Every way runs in turn, round by round, against the same file; medians of the rounds are shown. Ways inside
this process are driven by as many greenlets as the depth says, each with one buffer that it uses again;
fio, qemu-img, caio and aiofiles run in processes of their own and measure themselves. Latency is taken of
every 16th request, so that taking it does not weigh on the rest.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import random
import re
import resource
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import RLock

from greenaio import File, __version__, aligned_buffer, config
from greenaio._commands.show import PROG, table, tell

BATCH_MAX = 32      # requests to an io_submit, for fio:batch
SAMPLED = 16        # of so many requests one is timed
BLOCK_MAX = 1 << 30 # bytes: the kernel takes less than 2 GiB in one request
MEMORY_SHARE = 0.5  # of the machine's memory: what all buffers together take at most
DEPTH_MAX = 10_000  # greenlets: each buffer is a mapping, and a process has some 65,000 of them
TICK = 0.001        # seconds: how often the ticker wants to run
OFFSETS = 1 << 18   # block numbers drawn beforehand: drawing one costs as much as submitting one

PICTURES = ('.png', '.svg', '.pdf')
RW = ('randread', 'randwrite', 'read', 'write', 'append')
OWN = ('greenaio', 'blocking', 'threadpool')
ASKED_FOR = ('greenaio:bytes', 'fileobject')
PROGRAMS = ('fio', 'fio:batch', 'fio:io_uring', 'qemu-img', 'qemu-img:threads', 'qemu-img:io_uring')
PACKAGES = ('caio', 'aiofiles')
OTHERS = PROGRAMS + PACKAGES


class BadArgument(Exception):
    """Told in one line, exit status 2."""


class Failure(Exception):
    """A program beside us that does not do here what it is asked for."""


@dataclass
class Load:
    """The load that every way gets."""

    path: str
    size: int
    block_size: int
    rw: str
    seconds: float
    buffered: bool
    cache: str = 'warm'

    @property
    def writing(self) -> bool:
        return self.rw.endswith('write') or self.appending

    @property
    def appending(self) -> bool:
        return self.rw == 'append'

    def offsets(self, depth: int) -> list[list[int]]:
        """Byte offsets for each of *depth* workers, to be gone through again and again; a multiple of
        SAMPLED of them."""
        blocks = self.size // self.block_size
        count = min(OFFSETS, max(blocks, 64 * depth)) // (SAMPLED * depth) * SAMPLED * depth
        count = max(count, SAMPLED * depth)
        if self.rw.startswith('rand'):
            rng = random.Random(depth)
            numbers = [rng.randrange(blocks) for _ in range(count)]
        elif self.appending:
            numbers = [-(-self.size // self.block_size) + i for i in range(count)]
        else:
            numbers = [i % blocks for i in range(count)]
        return [[n * self.block_size for n in numbers[i::depth]] for i in range(depth)]

    def open(self) -> File:
        flags = os.O_RDWR if self.writing else os.O_RDONLY
        file = File(self.path, flags | (0 if self.buffered else os.O_DIRECT))
        if self.buffered and self.cache == 'cold':
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)     # or read-ahead warms it
        return file

    def prepare(self) -> None:
        """Before each run: the file as long as it was, the page cache as asked for. Of O_DIRECT files it has
        nothing, or a write over dirty pages would be told that it waits, and take threads."""
        with open(self.path, 'r+b' if self.writing else 'rb') as file:
            if self.appending:
                file.truncate(self.size)
            if self.cache == 'cold' or not self.buffered:
                if self.writing:
                    os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 20):
                    pass


@dataclass
class Result:
    """One way at one depth: medians over the rounds."""

    way: str
    depth: int
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def median(self, *path: str) -> float | None:
        values = []
        for one in self.rounds:
            value: Any = one
            for key in path:
                value = value.get(key) if value else None
            if value is not None:
                values.append(value)
        return statistics.median(values) if values else None

    def summary(self, block_size: int) -> dict[str, Any]:
        iops = self.median('iops') or 0.0
        gap = {key: self.median('hub_gap_ms', key) for key in ('p99', 'max')}
        return {
            'way': self.way, 'depth': self.depth, 'iops': iops, 'mb_s': iops * block_size / 1e6,
            'cpu_us': self.median('cpu_us'),
            'latency_us': {key: self.median('latency_us', key) for key in ('p50', 'p99', 'p999')},
            'hub_gap_ms': gap if gap['max'] is not None else None,
            'rounds': self.rounds,
        }


# Ways inside this process ------------------------------------------------------------------------


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _figures(count: int, seconds: float, cpu: float, latencies_ns: Sequence[int],
             gaps: Sequence[float]) -> dict[str, Any]:
    gap = None
    if gaps:
        late = sorted(max(0.0, gap) * 1e3 for gap in gaps)
        gap = {'p99': late[min(len(late) - 1, len(late) * 99 // 100)], 'max': late[-1]}
    return {'iops': count / seconds, 'cpu_us': cpu / max(count, 1) * 1e6,
            'latency_us': _percentiles(latencies_ns), 'hub_gap_ms': gap, 'requests': count}


def _percentiles(latencies_ns: Sequence[int]) -> dict[str, float]:
    wanted = {'p50': 50.0, 'p99': 99.0, 'p999': 99.9}
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError:
        ordered = sorted(latencies_ns) or [0]
        return {name: ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] / 1e3
                for name, p in wanted.items()}
    histogram = HdrHistogram(1, 60_000_000_000, 3)
    for value in latencies_ns:
        histogram.record_value(value)
    return {name: histogram.get_value_at_percentile(p) / 1e3 for name, p in wanted.items()}


def _greenlets(load: Load, depth: int,
               operation: Callable[[list[memoryview], int], Any]) -> dict[str, Any]:
    """*depth* greenlets calling *operation* until the time is up, and one that ticks."""
    counts: list[int] = []
    gaps: list[float] = []
    latencies = array.array('q')
    clock = time.perf_counter_ns

    def worker(offsets: list[int]) -> None:
        buffers = [aligned_buffer(load.block_size)]
        groups = [(offsets[i], offsets[i + 1:i + SAMPLED]) for i in range(0, len(offsets), SAMPLED)]
        count = 0
        start.wait()
        while True:
            for first, rest in groups:
                began = clock()
                if began >= end:
                    counts.append(count)
                    return
                operation(buffers, first)
                latencies.append(clock() - began)
                for offset in rest:
                    operation(buffers, offset)
                count += SAMPLED

    def ticker() -> None:
        while clock() < end:
            began = clock()
            gevent.sleep(TICK)
            gaps.append((clock() - began) / 1e9 - TICK)

    start = Event()
    workers = [gevent.spawn(worker, offsets) for offsets in load.offsets(depth)]
    gevent.sleep(0.01)                      # all are at the start, and what they need is made
    seconds, cpu = time.perf_counter(), _cpu()
    end = clock() + int(load.seconds * 1e9)
    start.set()
    tick = gevent.spawn(ticker)
    gevent.joinall(workers, raise_error=True)
    seconds, cpu = time.perf_counter() - seconds, _cpu() - cpu
    tick.join()
    return _figures(sum(counts), seconds, cpu, latencies, gaps)


def _greenaio(load: Load, depth: int) -> dict[str, Any]:
    with load.open() as file:
        return _greenlets(load, depth, file.pwritev if load.writing else file.preadv)


def _greenaio_bytes(load: Load, depth: int) -> dict[str, Any]:
    with load.open() as file:
        pread, nbytes = file.pread, load.block_size
        return _greenlets(load, depth, lambda buffers, offset: pread(nbytes, offset))


def _greenaio_poll(load: Load, depth: int) -> dict[str, Any]:
    before, config.poll_max_us = config.poll_max_us, _greenaio_poll.limit  # type: ignore[attr-defined]
    try:
        return _greenaio(load, depth)
    finally:
        config.poll_max_us = before


def _blocking(load: Load, depth: int) -> dict[str, Any]:
    # Yields after each request, as a server's greenlet does when it goes back to its socket.
    with load.open() as file:
        fd, call = file.fileno(), os.pwritev if load.writing else os.preadv

        def operation(buffers: list[memoryview], offset: int) -> None:
            call(fd, buffers, offset)
            gevent.sleep(0)

        return _greenlets(load, depth, operation)


def _threadpool(load: Load, depth: int) -> dict[str, Any]:
    with load.open() as file:
        fd, call = file.fileno(), os.pwritev if load.writing else os.preadv
        apply = gevent.get_hub().threadpool.apply
        return _greenlets(load, depth, lambda buffers, offset: apply(call, (fd, buffers, offset)))


def _fileobject(load: Load, depth: int) -> dict[str, Any]:
    # One for all, as their position is: what a server has that opens its file once.
    from gevent.fileobject import FileObjectThread
    with load.open() as file:
        mine = FileObjectThread(os.dup(file.fileno()), 'r+b' if load.writing else 'rb', buffering=0)
        turn = RLock()

        def operation(buffers: list[memoryview], offset: int) -> None:
            with turn:
                mine.seek(offset)
                mine.write(buffers[0]) if load.writing else mine.readinto(buffers[0])

        try:
            return _greenlets(load, depth, operation)
        finally:
            mine.close()


# Other programs ----------------------------------------------------------------------------------


FIO = {'fio': ['--ioengine=libaio'], 'fio:io_uring': ['--ioengine=io_uring'],
       'fio:batch': ['--ioengine=libaio', f'--iodepth_batch_submit={BATCH_MAX}',
                     '--iodepth_batch_complete_min=1', f'--iodepth_batch_complete_max={BATCH_MAX}']}


def fio_command(load: Load, depth: int, way: str = 'fio') -> list[str]:
    return ['fio', '--name=bench', f'--filename={load.path}', f'--size={load.size}', *FIO[way],
            f'--direct={int(not load.buffered)}', f'--rw={load.rw}', f'--bs={load.block_size}',
            f'--iodepth={depth}', f'--runtime={load.seconds}', '--time_based', '--norandommap',
            f'--invalidate={int(load.cache == "cold")}',
            '--randrepeat=0', '--output-format=json']


def _fio(load: Load, depth: int, way: str = 'fio') -> dict[str, Any]:
    job = json.loads(_run(fio_command(load, depth, way)))['jobs'][0]
    side = job['write' if load.writing else 'read']
    percent = side['clat_ns']['percentile']
    return {'iops': side['iops'], 'requests': side['total_ios'], 'hub_gap_ms': None,
            'cpu_us': (job['usr_cpu'] + job['sys_cpu']) / 100 * 1e6 / max(side['iops'], 1e-9),
            'latency_us': {'p50': percent['50.000000'] / 1e3, 'p99': percent['99.000000'] / 1e3,
                           'p999': percent['99.900000'] / 1e3}}


def qemu_command(load: Load, depth: int, count: int, engine: str = 'native') -> list[str]:
    cache = 'writeback' if load.buffered and engine != 'native' else 'none'     # which is for O_DIRECT alone
    return ['qemu-img', 'bench', '-f', 'raw', '-t', cache, '-i', engine, '-d', str(depth),
            '-s', str(load.block_size), '-c', str(count), *(['-w'] if load.writing else []),
            load.path]


def _qemu_img(load: Load, depth: int, engine: str = 'native') -> dict[str, Any]:
    # It has no clock, only a count: a short run tells how many will take the time asked for.
    trial = 2000
    count = max(trial, int(trial / _qemu_seconds(load, depth, trial, engine) * load.seconds))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = _qemu_seconds(load, depth, count, engine)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {'iops': count / seconds, 'requests': count, 'cpu_us': cpu / count * 1e6,
            'latency_us': None, 'hub_gap_ms': None}


def _qemu_seconds(load: Load, depth: int, count: int, engine: str) -> float:
    found = re.search(r'Run completed in ([\d.]+) seconds', _run(qemu_command(load, depth, count, engine)))
    if found is None:
        raise Failure('qemu-img bench printed no time')
    return max(float(found[1]), 1e-3)


ASYNCIO = '''
import array, asyncio, json, os, sys, time, resource
try:
    from uvloop import run
except ImportError:
    from asyncio import run
library, path, rw, block, depth, seconds, offsets = json.loads(sys.stdin.read())
writing, data = rw.endswith('write'), bytes(block)
fd = os.open(path, os.O_RDWR if writing else os.O_RDONLY)
async def caio():
    from caio.linux_aio_asyncio import AsyncioContext
    context = AsyncioContext(max_requests=max(depth, 2))
    if writing:
        return lambda offset: context.write(data, fd, offset)
    return lambda offset: context.read(block, fd, offset)
async def aiofiles():
    import aiofiles
    file = await aiofiles.open(fd, 'r+b' if writing else 'rb', buffering=0, closefd=False)
    turn = asyncio.Lock()
    async def operation(offset):
        async with turn:
            await file.seek(offset)
            await (file.write(data) if writing else file.read(block))
    return operation
async def main():
    operation = await (caio if library == 'caio' else aiofiles)()
    end, counts, latencies, gaps = time.perf_counter_ns() + int(seconds * 1e9), [], array.array('q'), []
    async def worker(mine):
        count = 0
        while True:
            for offset in mine:
                began = time.perf_counter_ns()
                if began >= end:
                    counts.append(count)
                    return
                await operation(offset)
                if count % 16 == 0:
                    latencies.append(time.perf_counter_ns() - began)
                count += 1
    async def ticker():
        while time.perf_counter_ns() < end:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - began - 0.001)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(ticker(), *map(worker, offsets))
    seconds_taken, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([sum(counts), seconds_taken, cpu, latencies.tolist(), gaps]))
run(main())
'''


def _asyncio(load: Load, depth: int, library: str) -> dict[str, Any]:
    # Buffered always: they read into memory of their own that O_DIRECT does not accept.
    request = [library, load.path, load.rw, load.block_size, depth, load.seconds, load.offsets(depth)]
    return _figures(*json.loads(_run([sys.executable, '-c', ASYNCIO], json.dumps(request))))


def _run(command: list[str], stdin: str = '') -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f'exit status {done.returncode}'
        raise Failure(f'{os.path.basename(command[0])} failed: {said.splitlines()[-1]}')
    return done.stdout


WAYS: dict[str, Callable[[Load, int], dict[str, Any]]] = {
    'greenaio': _greenaio, 'greenaio+poll': _greenaio_poll, 'greenaio:bytes': _greenaio_bytes,
    'blocking': _blocking, 'threadpool': _threadpool, 'fileobject': _fileobject,
    **{way: partial(_fio, way=way) for way in FIO}, 'qemu-img': _qemu_img,
    'qemu-img:threads': partial(_qemu_img, engine='threads'),
    'qemu-img:io_uring': partial(_qemu_img, engine='io_uring'),
    **{library: partial(_asyncio, library=library) for library in PACKAGES},
}


def _installed(way: str) -> bool:
    if way in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return bool(metadata.version(way))
        return False
    return way not in OTHERS or shutil.which(way.partition(':')[0]) is not None


# The file ----------------------------------------------------------------------------------------


def _real_folder() -> str:
    """The temporary directory, or one beside it that is not in memory."""
    for folder in (tempfile.gettempdir(), '/var/tmp', os.getcwd()):
        if os.access(folder, os.W_OK) and _file_system(folder) not in ('tmpfs', 'ramfs', 'overlay'):
            return folder
    return tempfile.gettempdir()


def _file_system(path: str) -> str:
    """The type of the file system that *path* is on, as /proc/self/mounts names it."""
    best, kind = '', 'unknown'
    with contextlib.suppress(OSError), open('/proc/self/mounts') as mounts:
        for line in mounts:
            _, point, this, *_ = line.split()
            under = os.path.realpath(path) + '/'
            if under.startswith(point.rstrip('/') + '/') and len(point) >= len(best):
                best, kind = point, this
    return kind


@contextlib.contextmanager
def _bench_file(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The path to work on and how many bytes of it; made here, and removed, unless it was there."""
    path, size = arguments.path, arguments.size
    if path is None or os.path.isdir(path):
        folder = path or _real_folder()
        free = shutil.disk_usage(folder).free
        if size > free:
            raise BadArgument(f'{folder} has {free >> 20:,} MiB free, too few for --size {size >> 20:,} MiB')
        fd, path = tempfile.mkstemp(prefix='greenaio-bench-', dir=folder)
        try:
            with _naming(path):
                with open(fd, 'wb', buffering=0):
                    _fill(fd, size)
                yield path, size
        finally:
            os.unlink(path)
    elif not os.path.exists(path):
        raise BadArgument(f'{path}: no such file or folder')
    else:
        if arguments.rw not in ('randread', 'read') and not arguments.overwrite:
            raise BadArgument(f'{path} exists; --overwrite allows --rw {arguments.rw} to destroy it')
        mode = os.stat(path).st_mode        # before the open, which of a FIFO waits for a writer
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BadArgument(f'{path} is neither a file nor a block device')
        with open(path, 'rb') as file:
            length = file.seek(0, os.SEEK_END)
            size = length if arguments.rw == 'append' else min(size, length)
            if arguments.rw == 'append' and stat.S_ISBLK(mode):
                raise BadArgument(f'{path} is a block device: it gets no longer')
        if size < arguments.block_size:
            raise BadArgument(f'{path} is smaller than a block of {arguments.block_size} bytes')
        with _naming(path):
            yield path, size


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Have errors that name no file name *path*."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def _fill(fd: int, size: int) -> None:
    chunk = os.urandom(1 << 20)         # not zeros, not a hole: a disk may cheat on both
    for at in range(0, size, len(chunk)):
        view = memoryview(chunk)[:size - at]
        while view:
            view = view[os.write(fd, view):]
    os.fsync(fd)


# Output -----------------------------------------------------------------------------------

COLUMNS = ('way', 'depth', 'IOPS', 'MB/s', 'CPU µs', 'p50 µs', 'p99 µs', 'p99.9 µs', 'gap p99 ms',
           'gap max ms')


def _row(one: dict[str, Any]) -> list[str]:
    def number(value: float | None, digits: int = 0) -> str:
        return '-' if value is None else f'{value:,.{digits}f}'

    latency, gap = one['latency_us'], one['hub_gap_ms'] or {}
    return [one['way'], str(one['depth']), number(one['iops']), number(one['mb_s']),
            number(one['cpu_us'], 2), *(number(latency[key]) for key in ('p50', 'p99', 'p999')),
            number(gap.get('p99'), 2), number(gap.get('max'), 2)]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call at each step; it shows something on a terminal only."""
    try:
        from rich.progress import Progress
    except ImportError:
        with _plain_progress(total) as plain_step:
            yield plain_step
        return
    with Progress(disable=not sys.stderr.isatty(), transient=True,
                  **_console_on_stderr()) as progress:
        task = progress.add_task('', total=total)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        yield step


@contextlib.contextmanager
def _plain_progress(total: int) -> Iterator[Callable[[str], None]]:
    steps = itertools.count(1)

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)     # the line again

    try:
        yield lambda text: show(f'{next(steps)} of {total}: {text}')
    finally:
        show('')


def _console_on_stderr() -> dict[str, Any]:
    from rich.console import Console
    return {'console': Console(stderr=True)}


def _plot(results: list[dict[str, Any]], path: str, title: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout='constrained')
    figure.suptitle(title)
    for way in dict.fromkeys(one['way'] for one in results):
        mine = [one for one in results if one['way'] == way]
        depths = [one['depth'] for one in mine]
        axes[0].plot(depths, [one['iops'] for one in mine], 'o-', label=way)
        axes[1].plot(depths, [one['cpu_us'] for one in mine], 'o-', label=way)
        gaps = [(one['depth'], one['hub_gap_ms']['p99']) for one in mine if one['hub_gap_ms']]
        if gaps:
            axes[2].plot(*zip(*gaps), 'o-', label=way)
    depths = sorted({one['depth'] for one in results})
    for axis, label in zip(axes, ('IOPS', 'CPU µs per request', 'hub gap, p99, ms')):
        axis.set_xscale('log', base=2)
        axis.set_xlabel('depth')
        axis.set_title(label)
        axis.set_xticks(depths, map(str, depths))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:     # else there is no way with a hub of its own
            axis.legend()
    axes[0].set_ylim(bottom=0)
    for axis in axes[1:]:
        axis.set_yscale('log')
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    for axis in axes:
        axis.yaxis.set_major_formatter('{x:,.9g}')      # numbers as in the table
    figure.savefig(path, dpi=120)


def _versions() -> dict[str, str]:
    found = {'python': platform.python_version(), 'greenaio': __version__}
    for name in ('gevent', 'greenlet', 'caio'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for name in ('fio', 'qemu-img'):
        if shutil.which(name):
            found[name] = _run([name, '--version']).splitlines()[0]
    return found


def _machine() -> dict[str, Any]:
    model = platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as cpuinfo:
        for line in cpuinfo:
            if line.startswith('model name'):
                model = line.split(':', 1)[1].strip()
                break
    return {'cpu': model, 'cpus': os.cpu_count(), 'kernel': platform.release(),
            'loop': type(gevent.get_hub().loop).__module__}


# Arguments ---------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes, written as for fio and dd: 4096, 4k, 256M, 1G."""
    found = re.fullmatch(r'(\d{1,18})([kmgt]?)(?:i?b)?', text.strip().lower())
    size = int(found[1]) << (10 * ' kmgt'.index(found[2] or ' ')) if found else 0
    if not 0 < size < 1 << 63:
        raise argparse.ArgumentTypeError(f'{text!r} is no size such as 4096, 4k or 256M')
    return size


def _depths(text: str) -> list[int]:
    try:
        depths = [int(part) for part in text.split(',')]
    except ValueError:
        depths = [0]
    if min(depths) < 1 or max(depths) > DEPTH_MAX:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no list of depths such as 1,16,64, each {DEPTH_MAX:,} at most')
    return list(dict.fromkeys(depths))


def _against(text: str) -> list[str]:
    names = [name for name in dict.fromkeys(text.split(',')) if name]
    for name in names or [text]:
        if name not in OWN + ASKED_FOR + OTHERS:
            raise argparse.ArgumentTypeError(
                f'{name!r} is none of {", ".join(OWN[1:] + ASKED_FOR + OTHERS)}')
    return names


def number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], Any]:
    """Return the type of an argument that is a number from *least* to *most*."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is no number from {least:,} to {most:,}')

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('path', nargs='?', metavar='PATH',
                        help='a file or block device, or a folder to make one in (default: the '
                             'temporary directory, or one beside it that is on a disk)')
    parser.add_argument('--size', type=parse_size, default='256M', help='of the file (default 256M)')
    parser.add_argument('--block-size', type=parse_size, default='4k', help='(default 4k)')
    parser.add_argument('--depths', type=_depths, default='1,16,64,256', help='(default 1,16,64,256)')
    parser.add_argument('--seconds', type=number(float, 0.01, 86_400), default=2.0,
                        help='each way at each depth (default 2)')
    parser.add_argument('--rounds', type=number(int, 1, 10_000), default=1,
                        help='go through it all so often, and show medians (default 1)')
    parser.add_argument('--rw', choices=RW, default='randread', help='(default randread)')
    parser.add_argument('--against', type=_against, default=[], metavar='WAYS',
                        help=f'besides {", ".join(OWN)}: any of {", ".join(ASKED_FOR + OTHERS)}')
    parser.add_argument('--only', type=_against, metavar='WAYS', help='these ways and no others')
    parser.add_argument('--poll-us', type=number(int, 1, 1_000_000), metavar='MICROSECONDS',
                        help='one more way: greenaio with config.poll_max_us set to this')
    parser.add_argument('--buffered', action='store_true', help='through the page cache, no O_DIRECT')
    parser.add_argument('--cache', choices=('warm', 'cold'), default='warm',
                        help='with --buffered: whether the page cache has the file (default warm)')
    parser.add_argument('--overwrite', action='store_true', help='let --rw write to a PATH that exists')
    parser.add_argument('--json', metavar='FILE', help='all figures, and how they came about')
    parser.add_argument('--plot', metavar='FILE.png', help='a picture of it; needs matplotlib')


def main(arguments: argparse.Namespace) -> int:
    gevent.get_hub().NOT_ERROR += (OSError,)    # a greenlet's error is told once, by the caller
    try:
        return _main(arguments)
    except (BadArgument, Failure) as error:
        _tell(error)
        return 1 if isinstance(error, Failure) else 2


def _tell(problem: object) -> None:
    tell(f'{PROG} bench', problem)


def _main(arguments: argparse.Namespace) -> int:
    _check(arguments)
    ways = arguments.only or [*OWN, *(way for way in arguments.against if way not in OWN)]
    for way in [way for way in ways if not _installed(way)]:
        _tell(f'{way} is not installed, left out')
        ways.remove(way)
    if not ways:
        raise BadArgument('no way is left to measure')
    if arguments.poll_us:
        ways.insert(1, 'greenaio+poll')
        _greenaio_poll.limit = arguments.poll_us  # type: ignore[attr-defined]
    with _outputs(arguments.json, arguments.plot), _bench_file(arguments) as (path, size):
        load = Load(path, size, arguments.block_size, arguments.rw, arguments.seconds,
                    arguments.buffered, arguments.cache)
        _try(load)
        results = _measure(load, ways, arguments.depths, arguments.rounds)
        kind = f'buffered, {load.cache} cache' if load.buffered else 'O_DIRECT'
        title = (f'{load.rw}, {load.block_size} bytes, {kind}, '
                 f'{_file_system(path)}, {arguments.rounds} × {load.seconds:g} s')
    try:
        if arguments.json:
            with _naming(arguments.json):
                _write_json(arguments, load, title, results)
        if arguments.plot:
            with _naming(arguments.plot):
                _plot(results, arguments.plot, title)
    finally:                            # last, as the output may be full; but a full disk must not cost it
        table(COLUMNS, [_row(one) for one in results], title=title, right=COLUMNS[1:])
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise BadArgument for arguments that do not go together, before anything is made or measured."""
    needed = arguments.block_size * max(arguments.depths)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if arguments.block_size % 512 and not arguments.buffered:
        raise BadArgument('--block-size must be a multiple of 512, or --buffered given')
    if arguments.block_size > BLOCK_MAX:
        raise BadArgument(f'--block-size is at most {BLOCK_MAX >> 20:,} MiB')
    if arguments.size < arguments.block_size:
        raise BadArgument('--size is smaller than --block-size')
    if needed > MEMORY_SHARE * memory:
        raise BadArgument(f'{max(arguments.depths):,} requests of {arguments.block_size:,} bytes take '
                          f'{needed >> 20:,} MiB, and this machine has {memory >> 20:,} MiB of memory')
    if arguments.cache == 'cold' and not arguments.buffered:
        raise BadArgument('--cache cold needs --buffered: O_DIRECT knows no cache')
    if arguments.rw == 'append' and {*(arguments.only or ()), *arguments.against} & set(OTHERS):
        raise BadArgument('--rw append is for the ways of our own; the others write where there is a file')
    if arguments.plot:
        if importlib.util.find_spec('matplotlib') is None:
            raise BadArgument('--plot needs matplotlib: pip install "greenaio[bench]"')
        if pathlib.Path(arguments.plot).suffix not in PICTURES:
            raise BadArgument(f'--plot {arguments.plot}: the name must end in {", ".join(PICTURES)}')
    named = [os.path.realpath(path) for path in (arguments.path, arguments.json, arguments.plot) if path]
    if len(set(named)) < len(named):
        raise BadArgument('PATH, --json and --plot must be different files')


@contextlib.contextmanager
def _outputs(*paths: str | None) -> Iterator[None]:
    """Make the files that do not exist before all the work, and not after it; remove them if that fails."""
    made: list[str] = []
    try:
        for path in filter(None, paths):
            is_new = not os.path.lexists(path)
            try:
                open(path, 'ab').close()
            except OSError as error:
                raise BadArgument(f'{path}: {error.strerror}') from None
            made += [path] * is_new
        yield
    except BaseException:
        for path in made:
            os.unlink(path)
        raise


def _try(load: Load) -> None:
    """Raise BadArgument for a file that takes no request of this kind."""
    try:
        with load.open() as file:
            if load.buffered:
                return
            os.preadv(file.fileno(), [aligned_buffer(load.block_size)], 0)
    except OSError as error:
        if error.errno != errno.EINVAL or load.buffered:
            raise
        raise BadArgument(f'{load.path} takes no O_DIRECT request of {load.block_size} bytes; '
                          'give another --block-size, or --buffered') from None


def _write_json(arguments: argparse.Namespace, load: Load, title: str, results: list[dict[str, Any]]) -> None:
    with open(arguments.json, 'w') as file:
        json.dump({'title': title, 'command': [sys.executable, '-m', 'greenaio', *sys.argv[1:]],
                   'machine': _machine(), 'versions': _versions(),
                   'commands': {'fio': fio_command(load, arguments.depths[0]),
                                'qemu-img': qemu_command(load, arguments.depths[0], 2000)},
                   'results': results}, file, indent=1)


def _measure(load: Load, ways: list[str], depths: list[int], rounds: int) -> list[dict[str, Any]]:
    results = {(depth, way): Result(way, depth) for depth in depths for way in ways}
    failed: dict[str, Failure] = {}
    with _progress(rounds * len(results)) as step:
        for number in range(rounds):
            for depth in depths:
                # Another one first in each round: a disk remembers what went before.
                for way in ways[number % len(ways):] + ways[:number % len(ways)]:
                    step(f'{way}, depth {depth}' + (f', round {number + 1}' if rounds > 1 else ''))
                    if way in failed:
                        continue
                    load.prepare()
                    try:
                        results[depth, way].rounds.append(WAYS[way](load, depth))
                    except Failure as error:
                        failed[way] = error
        if load.appending:
            load.prepare()
    if len(failed) == len(ways):
        raise failed[ways[0]]
    for way, why in failed.items():
        _tell(f'{way} is left out: {why}')
    return [result.summary(load.block_size) for result in results.values() if result.way not in failed]
