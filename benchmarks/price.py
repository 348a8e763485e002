"""What ordinary operations on files cost a program that turns greenaio on, when there is nothing to wait for.

Three processes make the same calls: without gevent's patches, with them, and with greenaio's. They take turns
for each operation. *hot* is a loop of one operation; *cold* has 300 µs of unrelated Python between two calls,
because a loop finds everything in the caches of the processor, which a server does not.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

from benchmarks.contest import Bar, Contest
from greenaio._commands import bench

ROOT = pathlib.Path(__file__).parent.parent
MODES = {'patched': 'gevent.monkey.patch_all(greenaio=True)', 'gevent': 'gevent.monkey.patch_all()',
         'plain': ''}
BLOCKS = 5              # of a measurement; a way's figure is their median
PAUSE = 300e-6          # seconds
# At most so many times the price with gevent alone.
WANTED = {'open, read, close': 1.5, 'Path.read_bytes': 1.5, '10,000 lines': 2, 'json.load': 1.2, 'stat': 2,
          'exists': 2, 'log record': 1.05, 'append a line': 4, 'rewrite': 1.5, 'temporary file': 3,
          'spool 1 MiB': 2, 'read 8 MiB': 1.2, 'copy 4 KiB': 1.5, 'unzip 50': 1.1}
WANTED_ON_OVERLAYFS = {'open, read, close': 4, 'Path.read_bytes': 4, '10,000 lines': 2, 'json.load': 2,
                       'log record': 1.05}


# The process that is measured --------------------------------------------------------------------

def operations(home):
    """The operations by name, and how often each is called in a block."""
    import logging
    import shutil
    import zipfile

    small, text, big, archive, data = (
        os.path.join(home, name) for name in ('small', 'text', 'big', 'zip', 'data.json'))
    for path, content in ((small, b'x' * 4096), (text, b'a line of text of a usual length\n' * 10000),
                          (data, json.dumps({str(i): i for i in range(100)}).encode()),
                          (big, os.urandom(8 << 20))):
        pathlib.Path(path).write_bytes(content)
    with zipfile.ZipFile(archive, 'w') as members:
        for i in range(50):
            members.writestr(f'member{i}', b'hello world' * 100)
    log = logging.getLogger('price')
    log.propagate = False
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(os.path.join(home, 'log')))

    def open_read_close():
        with open(small, 'rb') as file:
            file.read()

    def write():
        with open(os.path.join(home, 'written'), 'wb') as file:
            file.write(b'y' * 4096)

    def append():
        with open(os.path.join(home, 'appended'), 'a') as file:
            file.write('line\n')

    def lines():
        with open(text) as file:
            for _ in file:
                pass

    def json_load():
        with open(data) as file:
            json.load(file)

    def unzip():
        with zipfile.ZipFile(archive) as members:
            for name in members.namelist():
                members.read(name)

    def temporary():
        with tempfile.NamedTemporaryFile(dir=home) as file:
            file.write(b'z' * 100)

    def spool():
        with tempfile.TemporaryFile(dir=home) as file:
            for _ in range(16):
                file.write(b'z' * 65536)
            file.seek(0)
            while file.read(65536):
                pass

    def read_big():
        with open(big, 'rb') as file:
            while file.read(65536):
                pass

    return {'open, read, close': (open_read_close, 1000),
            'Path.read_bytes': (pathlib.Path(small).read_bytes, 1000),
            '10,000 lines': (lines, 10),
            'json.load': (json_load, 500),
            'stat': (lambda: os.stat(small), 5000),
            'exists': (lambda: os.path.exists(small), 5000),
            'log record': (lambda: log.info('a record of %s', 'a usual length'), 1000),
            'append a line': (append, 500),
            'rewrite': (write, 200),
            'temporary file': (temporary, 300),
            'spool 1 MiB': (spool, 20),
            'read 8 MiB': (read_big, 10),
            'copy 4 KiB': (lambda: shutil.copyfile(small, os.path.join(home, 'copy')), 200),
            'copy 8 MiB': (lambda: shutil.copyfile(big, os.path.join(home, 'copy8')), 5),
            'unzip 50': (unzip, 20),
            'listdir': (lambda: os.listdir(home), 2000)}


def unrelated_work():
    """Take `PAUSE` with Python that has nothing to do with files."""
    end = time.perf_counter() + PAUSE
    while time.perf_counter() < end:
        sorted(str(i) for i in range(50))


def hot(call, times):
    """Return the seconds of a call, in a loop of *times* calls."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def cold(call, times):
    """Return the seconds of a call, the median of at most 200 that have other work between them."""
    found = []
    for _ in range(min(times, 200)):
        unrelated_work()
        found.append(hot(call, 1))
    return statistics.median(found)


def serve(folder):
    """Answer each line of standard input, an operation and how to measure it, with the seconds of blocks."""
    import gevent

    with tempfile.TemporaryDirectory(dir=folder) as home:
        known = gevent.spawn(operations, home).get()
        print(json.dumps(list(known)), flush=True)
        for line in sys.stdin:
            name, how = json.loads(line)
            call, times = known[name]
            gevent.spawn(hot, call, max(1, times // 10)).get()
            blocks = [gevent.spawn(globals()[how], call, times).get() for _ in range(BLOCKS)]
            print(json.dumps(blocks), flush=True)


# The rounds --------------------------------------------------------------------------------------

PROGRAM = '''
import sys
import gevent.monkey
{patch}
from benchmarks.price import serve
serve(sys.argv[1])
'''


class Worker:
    """A process of one mode. *command* starts it, and may prepare its folder."""

    def __init__(self, mode: str, folder: str, command: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*command, sys.executable, '-c', PROGRAM.format(patch=MODES[mode]), folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, 'PYTHONPATH': str(ROOT)})
        self.operations = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise bench.Failure(f'a process that is measured has ended with {self._process.wait()}')
        return line

    def measure(self, operation: str, how: str) -> dict[str, float]:
        print(json.dumps([operation, how]), file=self._process.stdin)
        found = json.loads(self._answer())
        return {'us': statistics.median(found) * 1e6, 'least_us': min(found) * 1e6}

    def close(self) -> None:
        self._process.communicate()


def contests(folder: str, wanted: dict[str, float], stack: contextlib.ExitStack,
             command: tuple[str, ...] = ()) -> list[Contest]:
    workers = {}
    for mode in MODES:
        workers[mode] = Worker(mode, folder, command)
        stack.callback(workers[mode].close)
    return [Contest(f'{name}, {how}',
                    {mode: partial(worker.measure, name, how) for mode, worker in workers.items()},
                    bars=(Bar(wanted[name], 'us', 'patched', 'gevent', most=True),) if name in wanted else ())
            for name in workers['plain'].operations for how in ('hot', 'cold')]


@contextlib.contextmanager
def price(options: Any) -> Any:
    """Ordinary operations on files in the page cache."""
    with contextlib.ExitStack() as stack:
        yield contests(options.folder, WANTED, stack)


# Each process has an overlay of its own in the folder $1, in a mount namespace that ends with the process.
MOUNT = '''
set -e
cd "$(mktemp -d -p "$1")"
mkdir lower upper work merged
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
shift
exec "$@"
'''


@contextlib.contextmanager
def price_overlay(options: Any) -> Any:
    """The same on overlayfs, the root of every container. Only root can mount it."""
    with contextlib.ExitStack() as stack:
        if os.geteuid() != 0:
            yield []
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
            command = ('unshare', '--mount', 'sh', '-c', MOUNT, 'sh', folder)
            yield contests('merged', WANTED_ON_OVERLAYFS, stack, command)
