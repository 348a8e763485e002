"""Files to read, disks to read them from, and a kernel that does what a script says."""

from __future__ import annotations

import concurrent.futures
import configparser
import contextlib
import ctypes
import errno
import gc
import importlib
import importlib.metadata
import io
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import deque
from typing import Any

import gevent
import pytest

import greenaio
from greenaio import _hub, _route
from greenaio._context import Context

MIB = 1 << 20
BATCH_MAX = 32                  # requests in one io_submit
PEEK_MAX = 64                   # events copied out at once
IN_CI = bool(os.environ.get('CI'))
ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / 'examples'
PROGRAMS = ROOT / 'tests' / 'programs'


def missing(reason):
    """Skip for want of a tool; in CI, where the project installs its tools, fail instead."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def known_fault(reason, raises=AssertionError):
    """Mark a test that has to pass one day, and must fail until then: in this way, and for this reason."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)


# Nothing inside a process ends a system call that a frozen disk holds. So another process looks on: it is
# told of each test that begins and each disk that is made, and where none has begun for long enough, thaws
# the disks and has the tests print where they are and die.
WATCHDOG = '''
import contextlib, os, select, signal, sys, time
pid, patience = int(sys.argv[1]), float(sys.argv[2])
test, disks = '', []
while select.select([0], [], [], patience)[0]:
    told = os.read(0, 65536).decode()
    if not told:
        sys.exit()
    for line in told.splitlines():
        what, value = line.split(None, 1)
        if what == 'disk':
            disks.append(int(value))
        else:
            test, disks = value, []
print('hangs:', test, file=sys.stderr)
for number in (signal.SIGABRT, signal.SIGKILL):
    for process in (*disks, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number if process == pid else signal.SIGCONT)
    time.sleep(5)
'''
PATIENCE = 600                  # seconds
_watchdog: subprocess.Popen[str] | None = None


def tell_watchdog(*words):
    if _watchdog is not None:
        print(*words, file=_watchdog.stdin, flush=True)


def pytest_sessionstart():
    global _watchdog
    # A shell has what it starts in the background ignore Ctrl-C, and so would what the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _watchdog = subprocess.Popen([sys.executable, '-c', WATCHDOG, str(os.getpid()), str(PATIENCE)],
                                 stdin=subprocess.PIPE, text=True, bufsize=1)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()                         # each test collects, and need not look at this again


def pytest_runtest_logstart(nodeid):
    tell_watchdog('test', nodeid)


def pytest_sessionfinish():
    if _watchdog is not None:
        _watchdog.communicate()


def file_system(path):
    return subprocess.run(['stat', '-f', '-c', '%T', str(path)], capture_output=True, text=True,
                          check=True).stdout.strip()


def real_disk():
    """A folder on a disk: a file system in memory completes everything in line, and hides bugs."""
    for folder in (tempfile.gettempdir(), '/var/tmp', os.getcwd()):
        if os.access(folder, os.W_OK) and file_system(folder) not in ('tmpfs', 'ramfs', 'overlayfs'):
            return folder
    return missing('no folder on a real disk')


def temporary_folder(kind):
    return tempfile.TemporaryDirectory(dir='/dev/shm' if kind == 'memory' else real_disk(),
                                       prefix='greenaio-test-')


@pytest.fixture(params=['disk', 'memory'])
def folder(request):
    """A folder on a disk, and once more one in memory."""
    with temporary_folder(request.param) as name:
        yield name


def side_by_side(request, test, work):
    """``work(**parameters)`` for each test named *test* that is to be run, as many at once as there are
    processors: a dict of finished futures. For processes of their own that do not look at the time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return {item.name: pool.submit(work, **item.callspec.params) for item in request.session.items
                if item.originalname == test}


@pytest.fixture
def disk_folder():
    with tempfile.TemporaryDirectory(dir=real_disk(), prefix='greenaio-test-') as name:
        yield name


def pattern(nbytes):
    """Bytes of which no two aligned 8 are the same."""
    return b''.join(i.to_bytes(8, 'little') for i in range(nbytes // 8))


@pytest.fixture
def data_file(folder):
    path = os.path.join(folder, 'data')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        file.flush()
        os.fsync(file.fileno())     # or O_DIRECT finds dirty pages, and io_submit waits for them
    return path


class ScriptedContext(Context):
    """A kernel without a kernel: takes what `answers` says, completes what the test says.

    It keeps the contract of the real one, which test_contract checks.
    """

    is_open = True
    depth = 0

    def __init__(self):
        super().__init__()
        self.answers: deque[Any] = deque()      # what submit says next: a number taken, or minus an errno
        self.slots = None           # so many requests fit, until their events are committed
        self.disk = None            # bytes: what reads find when they end
        self.inline = False         # complete each request inside its own submit
        self.frozen_at = None       # nanoseconds: what the time is, if not what it really is
        self.batches = []           # sizes, as taken
        self.submits = 0
        self.taken = []             # requests in the kernel's hands: dicts
        self.order = []             # offsets, in the order in which they were taken
        self.events = []
        self.committed = 0
        self._batch = []
        self.opened = []

    @property
    def staged(self):
        return len(self._batch)

    def open(self, depth):
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.opened.append(depth)
        self.depth = depth

    def now(self):
        return self.frozen_at or super().now()

    def stage(self, token, opcode, fd, address, nbytes, offset, flags):
        if len(self._batch) >= BATCH_MAX:
            raise ValueError(f'a batch holds {BATCH_MAX} requests')
        self._batch.append({'token': token, 'opcode': opcode, 'fd': fd, 'address': address,
                            'nbytes': nbytes, 'offset': offset, 'flags': flags})
        return 0

    def submit(self):
        batch, self._batch = self._batch, []
        self.submits += 1
        answer = self.answers.popleft() if self.answers else self._answer(len(batch))
        if callable(answer):
            answer = answer(batch)
        if answer > 0:
            assert answer <= len(batch)
            self.batches.append(answer)
            self.taken += batch[:answer]
            self.order += [request['offset'] for request in batch[:answer]]
            if self.inline:
                for request in batch[:answer]:
                    self.finish(request)
        return answer

    def _answer(self, n):
        if not self.is_open:
            return -errno.EINVAL
        if self.slots is None:
            return n
        return min(n, self.slots - len(self.taken) - len(self.events)) or (-errno.EAGAIN if n else 0)

    def finish(self, request=None, result=None, fill=None):
        """The disk has done *request*, by default the oldest it has."""
        request = self.taken[0] if request is None else request
        self.taken.remove(request)
        if fill is not None:
            ctypes.memset(request['address'], fill, request['nbytes'])
        elif self.disk is not None:
            found = self.disk[request['offset']:][:request['nbytes']]
            ctypes.memmove(request['address'], found, len(found))
        self.events.append((request['token'], request['nbytes'] if result is None else result))
        self.signal()

    def finish_all(self, **kwargs):
        while self.taken:
            self.finish(**kwargs)

    def peek(self):
        return min(len(self.events), PEEK_MAX)

    def token(self, index):
        return self.events[index][0]

    def result(self, index):
        return self.events[index][1]

    def commit(self, count):
        del self.events[:count]
        self.committed += count
        return 0

    def spin(self, limit_ns):
        return 1 if self.events else 0

    def after_fork_in_child(self):
        super().after_fork_in_child()
        self.is_open = False
        self._batch, self.taken, self.events = [], [], []

    def destroy(self):
        """Wait for the disk, as io_destroy does. The events go with the ring."""
        self.finish_all()
        self.events.clear()
        self.is_open = False


@pytest.fixture
def driver():
    """A Driver of this hub over a ScriptedContext, which is ``driver.engine.context``. To it no time passes,
    or a slow machine would end a pass where no test wants it, unless that is set free."""
    context = ScriptedContext()
    context.frozen_at = context.now()
    driver = _hub.Driver(gevent.get_hub(), context, depth=64)
    yield driver
    driver.engine._check()
    driver.close()


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test: nothing in flight, no greenlet that waits, no fd more than before. The test that
    leaves something fails, and the next one finds it gone. What the tests before taught a device, as to
    refuse RWF_NOWAIT, is forgotten."""
    gevent.get_hub()
    _hub.get_driver()
    _route.forgive()
    before = _open_files()
    yield
    gc.collect()
    driver = _hub.get_driver()
    for _ in range(400):
        # Who waits for what is done already has yet to be woken.
        if not _unfinished(driver) and len(_open_files()) <= len(before):
            break
        gevent.sleep(0.005)
    driver.engine._check()
    unfinished, leaked, after = _unfinished(driver), {}, _open_files()
    if len(after) > len(before):
        leaked = {fd: path for fd, path in after.items() if before.get(fd) != path}
        _close_files(leaked)
    if unfinished:
        gevent.get_hub().destroy(destroy_loop=True)     # the next test makes another
    assert not unfinished
    assert not leaked


def _unfinished(driver):
    """How many requests are in flight, or lent to threads, and how many greenlets wait: () if none."""
    counts = len(driver.engine.in_flight), len(driver.engine.lent), driver.waiting
    return counts if any(counts) else ()


def _open_files():
    """By number, the path of each open file, or its kind."""
    found = {}
    for fd in os.listdir('/proc/self/fd'):
        with contextlib.suppress(FileNotFoundError):        # the one that listed them
            found[int(fd)] = os.readlink(f'/proc/self/fd/{fd}')
    return found


def _close_files(leaked):
    """Close the file objects that have one of these numbers, then the numbers of files that are open still.
    Pipes, sockets and eventfds without an object here may be the hub's."""
    for thing in gc.get_objects():
        if issubclass(type(thing), (io.IOBase, socket.socket, greenaio.File)):
            with contextlib.suppress(Exception, gevent.Timeout), gevent.Timeout(1):
                if thing.fileno() in leaked:
                    thing.close()
    now = _open_files()
    for fd, path in leaked.items():
        if path.startswith('/') and now.get(fd) == path:
            os.close(fd)


def aio_nr():
    with open('/proc/sys/fs/aio-nr') as file:
        return int(file.read())


def contexts():
    """How many contexts of native AIO this process has. What aio-nr counts is the machine's."""
    with open('/proc/self/maps') as maps:
        return sum('[aio]' in line for line in maps)


def run_python(code, *args, **kwargs):
    """Run *code* in a fresh interpreter; return the finished process, its output as text.

    A program of more than 24 lines is a file of ``tests/programs``, for `run_program`.
    """
    return _run_interpreter(['-c', textwrap.dedent(code)], args, **kwargs)


def run_program(name, *args, **kwargs):
    """Run a file of ``tests/programs`` in a fresh interpreter; return the finished process."""
    return _run_interpreter([PROGRAMS / f'{name}.py'], args, **kwargs)


def _run_interpreter(program, args, options=(), env=None, timeout=60, check=True):
    env = {**os.environ, **(env or {})}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [env.get('PYTHONPATH'), str(ROOT)]))
    done = subprocess.run([sys.executable, *options, *program, *map(str, args)], capture_output=True,
                          text=True, timeout=timeout, env=env)
    if check:
        assert done.returncode == 0, done.stderr
        assert done.stderr == '', done.stderr
    return done


def run_example(name, *args, cwd=None, text=False, timeout=60):
    """Run an example as a user would; return the finished process, its output as bytes unless *text*."""
    return subprocess.run([sys.executable, EXAMPLES / f'{name}.py', *args], capture_output=True, text=text,
                          cwd=cwd, timeout=timeout)


def run_in_shell(command, redirection, *, before='', env=None, cwd=None):
    """Run *command* in a shell that redirects its output; return the finished process, its output as text.
    Python writes its output when it ends, whatever the environment of the tests says."""
    env = {**os.environ, **(env or {})}
    env.pop('PYTHONUNBUFFERED', None)
    return subprocess.run(['bash', '-c', f'{before}\n"$@" {redirection}', 'bash', *map(str, command)],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def example(request, monkeypatch):
    """The example that the test's module is about, imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.module.__name__.removeprefix('test_'))


def path_of_tests():
    """The environment in which `run_python` finds this module."""
    return {'PYTHONPATH': os.pathsep.join(
        filter(None, [os.path.dirname(__file__), os.environ.get('PYTHONPATH')]))}


def make_plugin_visible(folder):
    """The environment in which gevent finds our plugin, where greenaio is built in place, not installed."""
    if any(found.name == 'greenaio' for found in importlib.metadata.distributions()):
        return {}
    settings = configparser.ConfigParser()
    settings.read(os.path.join(os.path.dirname(__file__), '..', 'setup.cfg'))
    info = folder / 'greenaio-0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: greenaio\nVersion: 0\n')
    (info / 'entry_points.txt').write_text(''.join(
        f'[{group}]\n{entries}\n' for group, entries in settings['options.entry_points'].items()))
    path = filter(None, [str(folder), os.environ.get('PYTHONPATH')])
    return {'PYTHONPATH': os.pathsep.join(path)}


# A process that ticks beside the one that is tested: what it loses, the machine took.
CONTROL = '''
import sys, time
end, worst = time.monotonic() + float(sys.argv[1]), 0
while (now := time.monotonic()) < end:
    time.sleep(0.001)
    worst = max(worst, time.monotonic() - now - 0.001)
print(worst)
'''


_cgroup_number = itertools.count()


@pytest.fixture
def held_disk(disk_folder):
    """A file on a real disk, and a switch: ``hold()`` lets no read or write of this process finish,
    ``release()`` lets all finish. O_DIRECT only."""
    root = '/sys/fs/cgroup/blkio'
    if os.geteuid() != 0:
        missing('needs root')
    if not os.path.exists(f'{root}/blkio.throttle.read_iops_device'):
        subprocess.run(['mkdir', '-p', root], check=False)
        subprocess.run(['mount', '-t', 'cgroup', '-o', 'blkio', 'none', root], check=False,
                       capture_output=True)
    if not os.path.exists(f'{root}/blkio.throttle.read_iops_device'):
        missing('needs the blkio controller of cgroup v1')
    path = os.path.join(disk_folder, 'held')
    with open(path, 'wb') as file:
        file.write(pattern(4 * MIB))
        os.fsync(file.fileno())
    group = f'{root}/greenaio-{os.getpid()}-{next(_cgroup_number)}'
    os.mkdir(group)
    st = os.stat(path)
    device = f'{os.major(st.st_dev)}:{os.minor(st.st_dev)}'

    class Switch:
        file = path
        held = False

        def _set(self, iops):
            for kind in ('read', 'write'):
                with open(f'{group}/blkio.throttle.{kind}_iops_device', 'w') as control:
                    control.write(f'{device} {iops}')

        def hold(self):
            self._set(1)
            with open(f'{group}/cgroup.procs', 'w') as procs:
                procs.write(str(os.getpid()))
            self.held = True

        def release(self):
            self._set(0)
            self.held = False

        def commands(self, iops=1):
            """The same for the shell, for the process {me}: how to slow it down to *iops*, and back."""
            def limit(iops):
                return '; '.join(f'echo {device} {iops} >{group}/blkio.throttle.{kind}_iops_device'
                                 for kind in ('read', 'write'))
            return f'{limit(iops)}; echo {{me}} >{group}/cgroup.procs', limit(0)

    switch = Switch()
    yield switch
    switch.release()
    with open(f'{root}/cgroup.procs', 'w') as procs:
        procs.write(str(os.getpid()))
    for _ in range(100):
        try:
            os.rmdir(group)
            break
        except OSError:
            gevent.sleep(0.02)


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def is_mounted(folder):
    with open('/proc/self/mounts', errors='surrogateescape') as mounts:
        return any(line.split()[1] == folder for line in mounts)


class FreezableDisk:
    """A disk that stands still on demand: nbdkit serves it, nbdfuse makes it a file, and on that file there
    may be a loop device with a file system. ``path`` is a folder on it, or the file itself; ``pid`` is
    the server."""

    def __init__(self, folder, file_system=None, size='512M'):
        self._undo = []
        try:
            self._make(folder, file_system, size)
        except BaseException:
            self.close()
            raise

    def _make(self, folder, file_system, size):
        socket, pidfile, mount = (os.path.join(folder, name) for name in ('sock', 'pid', 'mnt'))
        os.mkdir(mount)
        run('nbdkit', '-P', pidfile, '-U', socket, 'memory', size)
        self._wait(lambda: os.path.exists(pidfile) and os.path.getsize(pidfile))
        with open(pidfile) as file:
            self.pid = int(file.read())
        tell_watchdog('disk', self.pid)
        self._undo.append(lambda: self._signal(signal.SIGTERM))
        disk = os.path.join(mount, 'disk')
        fuse = subprocess.Popen(['nbdfuse', '-C', '4', disk, f'nbd+unix:///?socket={socket}'])
        self._undo.append(lambda: (is_mounted(mount) and run('umount', mount), fuse.wait(10)))
        self._wait(lambda: os.path.exists(disk))
        self.path = disk
        if file_system is None:
            return
        loop = run('losetup', '--direct-io=on', '-f', '--show', disk).strip()
        self._undo.append(lambda: run('losetup', '-d', loop))
        run(f'mkfs.{file_system}', '-q', loop)
        self.path = os.path.join(folder, 'fs')
        os.mkdir(self.path)
        run('mount', loop, self.path)
        self._undo.append(lambda: run('umount', self.path))

    @staticmethod
    def _wait(there):
        end = time.monotonic() + 10
        while not there() and time.monotonic() < end:
            time.sleep(0.01)

    def freeze(self):
        subprocess.run(self.commands()[0], shell=True, check=True)

    def commands(self):
        """For the shell: how to freeze it, and how to thaw it. A process that was stopped is still at work
        until each of its threads has noticed."""
        return (f'kill -STOP {self.pid}; '
                f'while cat /proc/{self.pid}/task/*/stat | grep -qv ") [tT] "; do sleep 0.01; done',
                f'kill -CONT {self.pid}')

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):       # tests kill it, too
            os.kill(self.pid, number)

    def close(self):
        if hasattr(self, 'pid'):
            self._signal(signal.SIGCONT)
        while self._undo:
            for attempt in range(50):       # busy for as long as the last requests come home
                try:
                    self._undo[-1]()
                    break
                except (OSError, subprocess.CalledProcessError):
                    if attempt == 49:
                        raise
                    time.sleep(0.1)
            self._undo.pop()


@pytest.fixture(params=['fuse', 'ext4', 'xfs'])
def freezable(request, tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    for tool in ('nbdkit', 'nbdfuse', 'losetup', 'mkfs.xfs', 'mkfs.ext4'):
        if shutil.which(tool) is None:
            missing(f'needs {tool}')
    disk = FreezableDisk(str(tmp_path), None if request.param == 'fuse' else request.param)
    yield disk
    disk.close()
