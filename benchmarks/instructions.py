"""How many instructions a request takes, which no noise changes: ``python -m benchmarks.instructions``.

Fixed scenarios on /dev/shm run under ``valgrind --tool=callgrind``, with a clock that counts its calls. What
greenaio's own modules execute is compared with the baseline in ``instructions.json``; so is all that the
process does where Python, gevent and greenlet are those of the baseline. The status is 1 where one differs by
more than 5 %: after a change for the better or on purpose, ``--update`` writes a new baseline.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile

import gevent

import greenaio.os
from greenaio import File, aligned_buffer
from greenaio.__main__ import without_traceback

HERE = os.path.dirname(os.path.abspath(__file__))
BASELINE = os.path.join(HERE, 'instructions.json')
TOLERANCE = 0.05
REQUESTS = 3200                 # of each scenario, by all its greenlets together
WARM_UP = 10                    # a fraction of them goes before, uncounted
PAGE = 4096
SIZE = 256 * PAGE


class Place:
    def __init__(self, path):
        with open(path, 'wb') as file:
            file.write(bytes(SIZE))
        self.direct, self.cached = File(path, os.O_RDWR | os.O_DIRECT), File(path, os.O_RDWR)


def direct_reused_buffer(place):
    buffers = [aligned_buffer(PAGE)]
    return lambda offset: place.direct.preadv(buffers, offset)


def direct_bytes(place):
    return lambda offset: place.direct.pread(PAGE, offset)


def direct_write(place):
    data = aligned_buffer(PAGE)
    return lambda offset: place.direct.pwrite(data, offset)


def direct_sync(place):
    return lambda offset: place.direct.fdatasync()


def cached_bytes(place):
    return lambda offset: place.cached.pread(PAGE, offset)


def cached_bytes_by_fd(place):
    fd = place.cached.fileno()
    return lambda offset: greenaio.os.pread(fd, PAGE, offset)


def cached_write(place):
    data = bytes(PAGE)
    return lambda offset: place.cached.pwrite(data, offset)


SCENARIOS = [(make, depth) for make in (direct_reused_buffer, direct_bytes, direct_write, direct_sync)
             for depth in (1, 64)] + [(make, 1) for make in (cached_bytes, cached_bytes_by_fd, cached_write)]


def run(place, make, depth, requests):
    def work():
        ask = make(place)
        for i in range(requests // depth):
            ask(i * PAGE % SIZE)

    gevent.joinall([gevent.spawn(work) for _ in range(depth)], raise_error=True)


def run_all(path):
    """What callgrind looks at: it writes out what it has, and begins anew, at each getppid()."""
    place = Place(path)
    for make, depth in SCENARIOS:
        run(place, make, depth, REQUESTS // WARM_UP)
        os.getppid()
        run(place, make, depth, REQUESTS)
        os.getppid()


def count(path):
    """Of a file that callgrind wrote: instructions by object file, callees not included."""
    names: dict[str, str] = {}
    found: collections.Counter[str | None] = collections.Counter()
    current, is_call = None, False
    with open(path) as lines:
        for line in lines:
            if match := re.match(r'(c?)ob=\((\d+)\)(?: (.*))?', line):
                if match[3]:
                    names[match[2]] = match[3]
                if not match[1]:
                    current = names[match[2]]
            elif line.startswith('calls='):
                is_call = True          # the next line has what the callee took
            elif line[0] in '+-*' or line[0].isdigit():
                if not is_call:
                    found[current] += int(line.split()[1])
                is_call = False
    return found


def measure():
    """By scenario: instructions of a request in greenaio's modules, and in all."""
    package = os.path.dirname(os.path.abspath(greenaio.__file__)) + os.sep
    with tempfile.TemporaryDirectory(dir='/dev/shm') as folder:
        clock, out = os.path.join(folder, 'clock.so'), os.path.join(folder, 'out')
        source = os.path.join(HERE, 'clock.c')
        subprocess.run(['gcc', '-O2', '-shared', '-fPIC', '-o', clock, source], check=True)
        done = subprocess.run(
            ['setarch', '-R', 'valgrind', '--tool=callgrind', '--dump-before=getppid',
             f'--callgrind-out-file={out}', sys.executable, '-m', 'benchmarks.instructions', '--run',
             os.path.join(folder, 'data')], cwd=os.path.dirname(HERE), capture_output=True, text=True,
            env={**os.environ, 'LD_PRELOAD': clock, 'PYTHONHASHSEED': '0', 'GEVENT_LOOP': 'libev-cext'})
        if done.returncode:
            sys.exit(done.stderr)
        found = {}
        for number, (make, depth) in enumerate(SCENARIOS):
            counted = count(f'{out}.{2 * number + 2}')
            ours = sum(n for name, n in counted.items() if name and name.startswith(package))
            found[f'{make.__name__} {depth}'] = [round(ours / REQUESTS), round(counted.total() / REQUESTS)]
    return found


def versions():
    return {'python': platform.python_version(), 'machine': platform.machine(),
            **{name: importlib.metadata.version(name) for name in ('gevent', 'greenlet')}}


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.instructions', description=__doc__)
    parser.add_argument('--update', action='store_true', help='make what is counted now the baseline')
    parser.add_argument('--run', metavar='FILE', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run_all(arguments.run)
    found = measure()
    if arguments.update:
        with open(BASELINE, 'w') as file:
            json.dump({'versions': versions(), 'instructions': found}, file, indent=1)
            file.write('\n')
    with open(BASELINE) as file:
        baseline = json.load(file)
    same = baseline['versions'] == versions()
    print(f'{"instructions of a request":26} {"greenaio":>9} {"baseline":>9} {"all":>9} {"baseline":>9}')
    worse = []
    for name, counts in found.items():
        before = baseline['instructions'].get(name, [0, 0])
        print(f'{name:26} {counts[0]:9} {before[0]:9} {counts[1]:9} {before[1]:9}')
        if any(abs(now - then) > TOLERANCE * then for now, then in list(zip(counts, before))[:1 + same]):
            worse.append(name)
    if not same:
        print(f'All is not compared: the baseline is of {baseline["versions"]}, this of {versions()}')
    if worse:
        print(f'More than {TOLERANCE:.0%} from the baseline: {", ".join(worse)}')
    return 1 if worse else 0


if __name__ == '__main__':
    sys.exit(without_traceback('python -m benchmarks.instructions', main))
