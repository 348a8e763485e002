"""Sequential O_DIRECT reading by ``greenaio.open(direct=True)`` beside fio, and copying beside shutil."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from functools import partial

import gevent

import greenaio
from benchmarks.contest import Bar, Contest

MIB = 1 << 20
SIZE = 1024 * MIB


def read_by_greenaio(path, block):
    buffer = bytearray(block)
    began = time.perf_counter()
    with greenaio.open(path, 'rb', buffering=0, direct=True) as file:
        done = 0
        while n := file.readinto(buffer):
            done += n
    assert done == SIZE
    return {'mib_s': SIZE / (time.perf_counter() - began) / MIB}


def read_by_fio(path, block):
    done = subprocess.run(['fio', '--name=x', f'--filename={path}', '--direct=1', '--rw=read',
                           f'--bs={block}', f'--size={SIZE}', '--ioengine=libaio', '--iodepth=8',
                           '--output-format=json'], capture_output=True, check=True)
    return {'mib_s': json.loads(done.stdout)['jobs'][0]['read']['bw_bytes'] / MIB}


def forget(path):
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copy(copy, source, target):
    """A copy of a file that is not in memory, ended by fsync; and how late a tick was meanwhile."""
    forget(source)
    gaps = [0.0]

    def tick():
        while True:
            before = time.perf_counter()
            gevent.sleep(0.001)
            gaps.append(time.perf_counter() - before - 0.001)

    ticker = gevent.spawn(tick)
    gevent.sleep(0.01)
    began = time.perf_counter()
    copy(source, target)
    with greenaio.File(target, os.O_RDWR) as file:
        (file.fsync if copy is greenaio.copyfile else lambda: os.fsync(file.fileno()))()
    took = time.perf_counter() - began
    ticker.kill()
    os.unlink(target)
    return {'seconds': took, 'gap_p99_ms': sorted(gaps)[len(gaps) * 99 // 100] * 1e3,
            'gap_max_ms': max(gaps) * 1e3}


@contextlib.contextmanager
def streams(options):
    """1 GiB in order: read with O_DIRECT, copied."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = os.path.join(folder, 'source'), os.path.join(folder, 'target')
        with open(source, 'wb') as file:
            for _ in range(SIZE // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        yield [*[Contest(f'read, {block >> 10} KiB', {'greenaio': partial(read_by_greenaio, source, block),
                                                      'fio': partial(read_by_fio, source, block)},
                         bars=(Bar(0.9, 'mib_s', 'greenaio', 'fio'),))
                 for block in (64 << 10, 128 << 10, 1 << 20)],
               Contest('copy', {'greenaio': partial(timed_copy, greenaio.copyfile, source, target),
                                'shutil': partial(timed_copy, shutil.copyfile, source, target)},
                       bars=(Bar(1.0, 'seconds', 'greenaio', 'shutil', most=True),
                             Bar(50, 'gap_max_ms', 'greenaio', most=True)))]
