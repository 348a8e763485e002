"""Sequential O_DIRECT reading through ``greenaio.open(direct=True)`` beside fio, and copying beside shutil.

python benchmarks/streams.py [FOLDER]: medians of rounds in which the ways take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import gevent

import greenaio

MIB = 1 << 20


def read_by_greenaio(path, block, size):
    buffer = bytearray(block)
    began = time.perf_counter()
    with greenaio.open(path, 'rb', buffering=0, direct=True) as file:
        done = 0
        while n := file.readinto(buffer):
            done += n
    assert done == size
    return size / (time.perf_counter() - began) / MIB


def read_by_fio(path, block, size):
    done = subprocess.run(['fio', '--name=x', f'--filename={path}', '--direct=1', '--rw=read',
                           f'--bs={block}', f'--size={size}', '--ioengine=libaio', '--iodepth=8',
                           '--output-format=json'], capture_output=True, check=True)
    return json.loads(done.stdout)['jobs'][0]['read']['bw_bytes'] / MIB


def forget(path):
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copy(copy, source, target):
    """Seconds, ended by fsync, of a copy of a file that is not in memory; and the worst gap of a tick."""
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
    return took, max(gaps), sorted(gaps)[len(gaps) * 99 // 100]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', default='/var/tmp')
    parser.add_argument('--size', type=int, default=1024, help='MiB')
    parser.add_argument('--rounds', type=int, default=5)
    arguments = parser.parse_args()
    size = arguments.size * MIB
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = os.path.join(folder, 'source'), os.path.join(folder, 'target')
        with open(source, 'wb') as file:
            for _ in range(arguments.size):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        for block in (64 << 10, 128 << 10, 1 << 20):
            rounds = [(read_by_greenaio(source, block, size), read_by_fio(source, block, size))
                      for _ in range(arguments.rounds)]
            ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f'read, {block >> 10} KiB: greenaio {ours:.0f} MiB/s, fio {theirs:.0f} MiB/s, '
                  f'{ours / theirs:.2f}', flush=True)
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append(timed_copy(greenaio.copyfile, source, target)
                          + timed_copy(shutil.copyfile, source, target))
        values = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f'copy: greenaio {values[0]:.2f} s, gap {values[1] * 1e3:.1f} ms, '
              f'p99 {values[2] * 1e3:.1f} ms; '
              f'shutil {values[3]:.2f} s, gap {values[4] * 1e3:.0f} ms; {values[0] / values[3]:.2f}')


if __name__ == '__main__':
    sys.exit(main())
