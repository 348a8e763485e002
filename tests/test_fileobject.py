"""Files for gevent servers: as `io` has them, cooperative, shared, and safe to close."""

import array
import contextlib
import ctypes
import errno
import fcntl
import gc
import io
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import unittest
import warnings

import gevent
import gevent.fileobject
import pytest
from gevent.fileobject import FileObjectThread
from gevent.lock import Semaphore
from gevent.tests import test__fileobject as theirs
from gevent.threadpool import ThreadPool
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import greenaio
import greenaio.os
from greenaio._files import pool as _pool
from greenaio._files import turn as _turn
from greenaio.fileobject import BufferedReader, FileIO, FileObject, TextIOWrapper
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import ROOT, run_program, run_python

ENVIRONMENT = {'GEVENT_FILE': 'greenaio.fileobject.FileObject'}


# gevent's own tests ------------------------------------------------------------------------------

class TestFileObject(theirs.ConcurrentFileObjectMixin, theirs.TestFileObjectBlock):
    """gevent's, of our class. Not collected by pytest: these need gevent's own runner."""

    __test__ = False

    def _getTargetClass(self):      # noqa: N802
        return FileObject


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_passes_gevents_own_tests(loop):
    # The driver is made first: these tests close some fds twice, and that may hit one of ours.
    done = subprocess.run([sys.executable, '-c', '''
import gevent, sys, unittest
from greenaio._core import hub as _hub
gevent.get_hub()
_hub.get_driver()
from tests import test_fileobject
unittest.main(module=test_fileobject, argv=['test', 'TestFileObject'])
'''], cwd=ROOT, env={**os.environ, 'GEVENT_LOOP': loop}, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    ran, = re.findall(r'Ran (\d+) tests', done.stderr)
    assert int(ran) >= len(unittest.defaultTestLoader.loadTestsFromTestCase(TestFileObject)._tests) >= 15
    skipped = re.search(r'skipped=(\d+)', done.stderr)
    assert int(skipped[1] if skipped else 0) <= 3       # mode U, which Python has no more


def test_gevents_subprocess_tests_fail_no_more_than_without_it():
    def start(loop, more):
        return subprocess.Popen([sys.executable, '-m', 'gevent.tests.test__subprocess'],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, 'GEVENT_LOOP': loop, **more})

    for loop in ('libev-cext', 'libuv'):
        both = [start(loop, {}), start(loop, ENVIRONMENT)]
        plain, ours = (process.communicate(timeout=100)[1] for process in both)
        assert int(re.search(r'Ran (\d+) tests', ours)[1]) > 30
        failed = [set(re.findall(r'^(?:FAIL|ERROR): (\S+)', output, re.M)) for output in (plain, ours)]
        assert failed[1] <= failed[0], ours


@pytest.mark.parametrize('first', ['greenaio', 'gevent.fileobject', 'gevent.monkey', 'greenaio.fileobject',
                                   'gevent.subprocess'])
@pytest.mark.parametrize('value', ['greenaio.fileobject.FileObject', 'greenaio.fileobject.FileObject,thread'])
def test_environment_names_it_whatever_is_imported_first(first, value):
    run_python(f'import {first}, gevent.fileobject, greenaio.fileobject\n'
               'assert gevent.fileobject.FileObject is greenaio.fileobject.FileObject',
               env={'GEVENT_FILE': value})


def test_gevents_configuration_takes_it():
    run_python('''
        import gevent
        gevent.config.fileobject = 'greenaio.fileobject.FileObject'
        from gevent.fileobject import FileObject
        with FileObject('/etc/hostname', 'rb', bufsize=0, close=True) as file:
            assert file.read() == open('/etc/hostname', 'rb').read()
    ''')


# Beside io ---------------------------------------------------------------------------------------

class BesideIo(RuleBasedStateMachine):
    """The same calls on both: the same values, exceptions and positions. MODEL of the matrix."""

    def __init__(self):
        super().__init__()
        self.folder = pathlib.Path(os.environ['FOLDER_OF_TEST'])
        self.files = ()

    @initialize(mode=st.sampled_from(['rb', 'r+b', 'wb', 'w+b', 'ab', 'a+b', 'r', 'r+', 'w+', 'a', 'a+']),
                buffering=st.sampled_from([-1, -1, 0, 1, 5, 100]), content=st.binary(max_size=300),
                ours=st.sampled_from([greenaio.open, FileObject]), newline=st.sampled_from([None, '', '\n']))
    def begin(self, mode, buffering, content, ours, newline):
        self.text = 'b' not in mode
        if self.text and buffering == 0 or not self.text and buffering == 1:
            buffering = -1
        content = content if not self.text else content.hex(b'\n'[0:1].decode(), 7).encode()
        more = {'encoding': 'utf-8', 'newline': newline} if self.text else {}
        self.paths = [self.folder / name for name in ('io', 'ours')]
        for path in self.paths:
            path.write_bytes(content)
        self.files = [opener(path, mode, buffering, **more)
                      for opener, path in zip((open, ours), self.paths, strict=True)]

    def both(self, call):
        outcomes = []
        for file in self.files:
            try:
                outcomes.append(call(file))
            except Exception as error:
                kinds = [kind for kind in type(error).__mro__ if kind.__module__ in ('builtins', 'io')]
                outcomes.append(kinds[0])
        if self.files[1].closed and isinstance(outcomes[0], type) and outcomes[1] is OSError:
            return                      # gevent's file objects say EBADF when closed
        assert outcomes[0] == outcomes[1]

    @rule(n=st.integers(-1, 400))
    def read(self, n):
        self.both(lambda file: file.read(n))

    @rule()
    def readline(self):
        self.both(lambda file: file.readline())

    @rule()
    def readlines(self):
        self.both(lambda file: file.readlines())

    @rule(n=st.integers(0, 200))
    def readinto(self, n):
        def call(file):
            buffer = bytearray(n)
            return file.readinto(buffer), buffer
        if not self.text:
            self.both(call)

    @rule(data=st.binary(max_size=200))
    def write(self, data):
        self.both(lambda file: file.write(data.hex() + '\n' if self.text else data))

    @rule(data=st.sampled_from([b'bytes', 'text', None, 7]))
    def write_of_the_wrong_type(self, data):
        if self.text is not isinstance(data, str):
            self.both(lambda file: file.write(data))

    @rule(offset=st.integers(-5, 400), whence=st.sampled_from([0, 0, 1, 2, 7]))
    def seek(self, offset, whence):
        if not self.text or whence != 0 or offset == 0:
            self.both(lambda file: file.seek(offset, whence))

    @rule()
    def tell(self):
        self.both(lambda file: file.tell())

    @rule(size=st.one_of(st.none(), st.integers(-1, 400)))
    def truncate(self, size):
        self.both(lambda file: file.truncate(size))

    @rule()
    def flush(self):
        self.both(lambda file: file.flush())
        assert self.paths[0].read_bytes() == self.paths[1].read_bytes()

    @rule()
    def kernel_position(self):
        self.both(lambda file: os.lseek(file.fileno(), 0, os.SEEK_CUR))

    @rule(what=st.sampled_from(['readable', 'writable', 'seekable', 'isatty', 'fileno', 'close']))
    def ask(self, what):
        if what == 'fileno':
            self.both(lambda file: file.fileno() > 0)
        else:
            self.both(lambda file: getattr(file, what)())

    def teardown(self):
        for file in self.files:
            file.close()
        if self.files:
            assert self.paths[0].read_bytes() == self.paths[1].read_bytes()


def test_same_as_io(folder, monkeypatch):
    monkeypatch.setenv('FOLDER_OF_TEST', folder)
    state = BesideIo.TestCase()
    state.settings = settings(max_examples=150, stateful_step_count=25, deadline=None, derandomize=True,
                              suppress_health_check=list(HealthCheck))
    state.runTest()


@pytest.mark.parametrize('arguments', [
    ('/no/such/file',), ('/no/such/file', 'wb'), ('/', 'rb'), ('/etc/hostname', 'rw'), ('/etc/hostname', 'q'),
    ('/etc/hostname', 'rtb'), ('/etc/hostname', '+'), ('/etc/hostname', 'rb', -1, 'utf-8'),
    ('/etc/hostname', 'rb', -1, None, 'strict'), ('/etc/hostname', 'rb', -1, None, None, '\n'),
    ('/etc/hostname', 'r', 0), ('/etc/hostname', 'r', -1, 'no-such-codec'),
    ('/etc/hostname', 'r', -1, None, None, 'x'), ('/etc/hostname', 'r', -1, None, None, None, False),
    (-1, 'rb'), (99999, 'rb'), (None,), (1.5,), ('a\0b',), ('/etc/hostname', 7), ('/etc/hostname', 'r', 'x'),
    ('/etc/hostname', 'xb'), ('x' * 300, 'rb'), ('/etc/hostname', ''),
])
def test_open_refuses_what_io_refuses(arguments):
    with pytest.raises(Exception) as wanted:
        open(*arguments)            # noqa: SIM115
    before = os.listdir('/proc/self/fd')
    with pytest.raises(wanted.type) as caught:
        greenaio.open(*arguments)
    assert getattr(caught.value, 'errno', None) == getattr(wanted.value, 'errno', None)
    assert getattr(caught.value, 'filename', None) == getattr(wanted.value, 'filename', None)
    assert len(os.listdir('/proc/self/fd')) == len(before)


def test_attributes_are_those_of_io(data_file):
    for mode in ('r', 'rb', 'r+b', 'a', 'w+b'):
        copy = data_file + mode
        with open(copy, 'w' if mode[0] == 'w' else 'a'):
            pass
        with open(copy, mode) as wanted, greenaio.open(copy, mode) as file:
            assert (file.mode, file.name, file.closed) == (wanted.mode, wanted.name, False)
            assert isinstance(file, [kind for kind in type(wanted).__mro__ if kind.__module__ == '_io'][0])
            raw, wanted_raw = (getattr(one, 'buffer', one).raw for one in (file, wanted))
            assert (raw.mode, raw.closefd, raw.name) == (wanted_raw.mode, True, copy)
            assert not os.get_inheritable(file.fileno())
            assert repr(raw) == repr(wanted_raw)
            with pytest.raises(TypeError):
                pickle.dumps(file)
        assert 'closed' in repr(raw)


def test_opener_and_fd(data_file):
    opened = []

    def opener(path, flags):
        opened.append(os.open(path, flags))
        return opened[0]

    with greenaio.open(data_file, 'rb', opener=opener) as file:
        assert file.fileno() == opened[0]
        assert file.read(8) == bytes(8)
        with greenaio.open(file.fileno(), 'rb', closefd=False) as other:
            assert other.name == opened[0]
        assert file.read(4) == pattern(MIB)[4096:4100] or file.tell() == 12
    for wrong, kind in ((lambda *_: 'x', TypeError), (lambda *_: -1, ValueError)):
        with pytest.raises(kind):
            greenaio.open(data_file, opener=wrong)


def test_position_is_the_kernels(data_file):
    """Those who were given the fd, or a dup of it, read on where it is."""
    with greenaio.open(data_file, 'rb', buffering=0) as file:
        assert file.read(100) == pattern(MIB)[:100]
        copy = os.dup(file.fileno())
        assert os.read(copy, 8) == pattern(MIB)[100:108]
        os.lseek(copy, 4096, os.SEEK_SET)
        assert file.read(8) == pattern(MIB)[4096:4104]
        os.posix_fadvise(copy, 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read(300000) == pattern(MIB)[4104:304104]
        assert os.lseek(copy, 0, os.SEEK_CUR) == 304104
        os.close(copy)


# Shared ------------------------------------------------------------------------------------------

def test_greenlets_that_read_lines_of_one_file_share_them_out(folder):
    path = os.path.join(folder, 'lines')
    lines = [f'{i} {"x" * (i % 300)}\n' for i in range(5000)]
    pathlib.Path(path).write_text(''.join(lines))
    for mode, opener in (('r', greenaio.open), ('rb', greenaio.open), ('r', FileObject), ('rb', FileObject)):
        got = []
        with opener(path, mode) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            def read():
                while line := file.readline():      # noqa: B023
                    got.append(line)                # noqa: B023
                    if len(got) % 7 == 0:           # noqa: B023
                        gevent.sleep(0)

            gevent.joinall([gevent.spawn(read) for _ in range(20)], raise_error=True, timeout=30)
        assert sorted(line if mode == 'r' else line.decode() for line in got) == sorted(lines)


def test_greenlets_that_write_one_file_lose_nothing(folder):
    path = os.path.join(folder, 'written')
    with greenaio.open(path, 'wb', buffering=100) as file:
        def write(i):
            for j in range(50):
                file.write(b'%d %d\n' % (i, j))

        gevent.joinall([gevent.spawn(write, i) for i in range(20)], raise_error=True, timeout=30)
    lines = pathlib.Path(path).read_bytes().splitlines()
    assert sorted(lines) == sorted(b'%d %d' % (i, j) for i in range(20) for j in range(50))
    for i in range(20):
        mine = [line for line in lines if line.split()[0] == b'%d' % i]
        assert mine == [b'%d %d' % (i, j) for j in range(50)]


def test_killed_while_it_waits_for_its_turn_it_holds_up_nobody(held_disk):
    with greenaio.open(held_disk.file, 'rb', buffering=4096, direct=True) as file:
        held_disk.hold()
        readers = [gevent.spawn(file.read, 10) for _ in range(4)]
        gevent.sleep(0.05)
        readers[1].kill()
        readers[2].kill(block=False)
        held_disk.release()
        gevent.joinall(readers, timeout=10)
        values = [reader.value for reader in readers]
    assert values[0] == pattern(10) + pattern(16)[8:10] or values[0] == pattern(16)[:10]
    assert isinstance(values[1], gevent.GreenletExit)
    assert values[3] == pattern(24)[10:20]


# Closed meanwhile --------------------------------------------------------------------------------

@pytest.mark.parametrize('buffering', [0, 4096])
def test_closed_while_read_the_readers_get_ebadf_and_the_memory_stays(held_disk, buffering):
    """
    reader              another             kernel
    read(), parks
                        close()
    OSError(EBADF)
    drops its buffer
                        allocates the like
                                            writes, into memory that is still pinned
    """
    file = greenaio.open(held_disk.file, 'rb', buffering, direct=True)
    held_disk.hold()

    def read():
        with pytest.raises(OSError, match='closed in another greenlet') as caught:
            file.read(4096)
        return caught.value.errno

    readers = [gevent.spawn(read) for _ in range(3)]
    gevent.sleep(0.05)
    with gevent.Timeout(2):
        file.close()
        gevent.joinall(readers, raise_error=True)
    assert [reader.value for reader in readers] == [9, 9, 9]
    assert file.closed
    gc.collect()
    canaries = [ctypes.create_string_buffer(b'\xaa' * 4096, 4096) for _ in range(64)]
    held_disk.release()
    gevent.sleep(0.1)
    assert all(canary.raw == b'\xaa' * 4096 for canary in canaries)
    with pytest.raises(ValueError, match='closed'):
        file.read(1)


def test_file_object_closed_while_read_as_gevents_own(held_disk):
    file = FileObject(os.open(held_disk.file, os.O_RDONLY | os.O_DIRECT), 'rb')
    held_disk.hold()
    reader = gevent.spawn(file.read, 4096)
    gevent.sleep(0.05)
    file.close()
    with pytest.raises(OSError, match='Bad file descriptor|closed in another'):
        reader.get(timeout=2)
    with pytest.raises(OSError, match='FileObject was closed') as caught:
        file.read(1)
    assert caught.value.errno == 9
    assert file.closed


def test_closed_while_written_what_was_written_is_there(folder):
    path = os.path.join(folder, 'written')
    file = greenaio.open(path, 'wb')
    writers = [gevent.spawn(file.write, bytes([65 + i]) * 50000) for i in range(3)]
    gevent.sleep(0)
    file.close()
    gevent.joinall(writers)
    assert pathlib.Path(path).read_bytes().startswith(b'A' * 50000)
    for i, writer in enumerate(writers):
        assert writer.value == 50000 or isinstance(writer.exception, (OSError, ValueError)), i


# Where nobody can wait ---------------------------------------------------------------------------

def test_in_the_hub_it_makes_the_plain_call(data_file, folder):
    path = os.path.join(folder, 'by-the-hub')
    results = []

    def callback():
        with greenaio.open(path, 'w') as file:
            file.write('from the hub')
        with FileObject(data_file, 'rb') as file:
            results.append(file.read(16))

    gevent.get_hub().loop.run_callback(callback)
    gevent.sleep(0.05)
    assert results == [pattern(16)]
    assert pathlib.Path(path).read_text() == 'from the hub'


@pytest.mark.filterwarnings('ignore::ResourceWarning')
@pytest.mark.parametrize('direct', [False, True])
def test_forgotten_with_bytes_in_its_buffer_it_loses_none(disk_folder, direct):
    path = os.path.join(disk_folder, 'forgotten')
    file = greenaio.open(path, 'w', direct=direct)
    file.write('not flushed')
    del file
    gc.collect()
    assert pathlib.Path(path).read_text() == 'not flushed'


def test_forgotten_it_warns(data_file):
    with pytest.warns(ResourceWarning, match='unclosed file') as caught:
        greenaio.open(data_file, 'rb')
        gc.collect()
    assert len(caught) == 1


def test_forgotten_and_destroyed_by_the_hub(folder):
    run_python('''
        import gevent, greenaio, sys, warnings
        warnings.simplefilter('ignore')
        path = sys.argv[1] + '/file'
        files = [greenaio.open(path, 'w')]
        gevent.sleep(0)
        files[0].write('x' * 10)
        gevent.get_hub().loop.run_callback(files.clear)
        gevent.sleep(0.01)
        assert open(path).read() == 'x' * 10
    ''', folder)


def test_at_the_end_of_the_interpreter_it_is_flushed(folder):
    path = os.path.join(folder, 'at-exit')
    run_python('''
        import atexit, gevent, greenaio, sys
        gevent.spawn(lambda: None).join()
        file = greenaio.open(sys.argv[1], 'w')
        file.write('flushed')
        class Last:
            def __init__(self):
                self.file = file
        sys.last_thing = Last()
    ''', path, env={'PYTHONWARNINGS': 'ignore'})
    assert pathlib.Path(path).read_text() == 'flushed'


def test_in_a_thread_without_a_hub(data_file):
    results = []

    def work():
        with greenaio.open(data_file, 'rb') as file:
            results.append(file.read(16))
        results.append(gevent._hub_local.get_hub_if_exists())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [pattern(16), None]


# What else it may be given -----------------------------------------------------------------------

def test_what_epoll_accepts_is_gevents_own(folder):
    reader, writer = os.pipe()
    with FileObject(reader, 'rb') as one, FileObject(writer, 'wb', 0) as other:
        assert type(one) is type(other) is gevent.fileobject.FileObjectPosix
        other.write(b'abc')
        assert one.read(3) == b'abc'
    fifo = os.path.join(folder, 'fifo')
    os.mkfifo(fifo)
    writing = gevent.spawn(FileObject, fifo, 'wb')
    with FileObject(fifo, 'rb') as file:
        assert type(file) is gevent.fileobject.FileObjectPosix
        assert file.name == fifo
        other = writing.get(timeout=5)
        other.write(b'through')
        other.close()
        assert file.read() == b'through'


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_what_epoll_refuses_is_ours(loop):
    run_python('''
        import io
        from greenaio.fileobject import FileObject
        import gevent.fileobject, greenaio
        for path in ('/proc/self/status', '/dev/null', '/sys/kernel/mm/transparent_hugepage/enabled'):
            with FileObject(path, 'r') as file, open(path) as wanted:
                assert type(file) is FileObject
                assert file.read()[:6] == wanted.read()[:6]
        with greenaio.open('/dev/null', 'wb') as file:
            assert file.write(b'gone') == 4
    ''', env={'GEVENT_LOOP': loop})


@pytest.mark.parametrize('mode', ['r', 'rb'])
def test_object_with_a_buffer_of_its_own_keeps_it(data_file, mode):
    pathlib.Path(data_file).write_bytes(b'one\r\ntwo\r\nthree')
    with open(data_file, mode, newline=None if 'b' in mode else '') as inner:
        first = inner.readline()
        file = FileObject(inner, mode)
        assert file.readline() == ('two\r\n' if mode == 'r' else b'two\r\n')
        assert file.name == data_file
        file.close()
        assert inner.closed
    assert first in ('one\r\n', b'one\r\n')


@pytest.mark.parametrize('kind', ['path', 'pipe', 'buffered object'])
def test_lock_of_the_caller_is_held_during_each_call(data_file, kind):
    """Also while the file is closed, because that flushes; and for a pipe, where gevent's takes no lock."""
    lock, held = Semaphore(), []
    reader, writer = os.pipe()
    buffered = io.BufferedReader(io.FileIO(data_file))
    target = {'path': data_file, 'pipe': reader, 'buffered object': buffered}[kind]
    os.write(writer, pattern(MIB)[:4096])
    os.close(writer)
    file = FileObject(target, 'rb', lock=lock)
    assert file.lock is lock
    lock.acquire()
    calls = [gevent.spawn(file.read, 8), gevent.spawn(file.readline, 1), gevent.spawn(lambda: next(file)),
             gevent.spawn(file.readable)]
    gevent.sleep(0.02)
    held += [call.ready() for call in calls]
    lock.release()
    gevent.joinall(calls, raise_error=True, timeout=10)
    assert held == 4 * [False] and calls[0].value == pattern(8) and not lock.locked()
    lock.acquire()
    closing = gevent.spawn(file.close)
    gevent.sleep(0.02)
    assert not closing.ready()
    lock.release()
    closing.get(timeout=10)
    buffered.close()
    if kind == 'pipe':
        with pytest.raises(OSError, match='Bad file descriptor'):
            os.fstat(reader)
    else:
        os.close(reader)


@pytest.mark.parametrize('lock', [True, False, None, 0])
def test_without_a_lock_of_the_caller_a_file_object_is_as_before(data_file, lock):
    with FileObject(data_file, 'rb', lock=lock) as file, FileObject(data_file, 'rb') as wanted:
        assert type(file) is FileObject and file.read(16) == wanted.read(16) == pattern(16)
        with file.lock:                 # any code may take it
            assert file.tell() == 16


def test_wrong_lock_is_refused_before_a_file_is_made(folder):
    """With the words of gevent's FileObjectThread."""
    for kind in (FileObject, FileObjectThread):
        with pytest.raises(TypeError, match=r"^Expected a Semaphore or boolean, got <class 'list'>$"):
            kind(os.path.join(folder, 'new'), 'w', lock=['a list'])
    assert os.listdir(folder) == []


def test_pool_of_the_caller_does_the_work_of_objects_that_take_a_pool(data_file):
    """Other files take native threads. gevent itself takes a pool that is idle for none."""
    pool, used = ThreadPool(1), []
    with FileObject(data_file, 'rb', threadpool=pool) as file:
        assert type(file) is FileObject and file.threadpool is pool and file.read(8) == pattern(8)
    assert pool.size == 0

    class Buffered(io.BufferedReader):
        def read(self, n):
            used.append(threading.get_ident())
            return super().read(n)

    for threadpool in (pool, None):
        with FileObject(Buffered(io.FileIO(data_file)), 'rb', threadpool=threadpool) as file:
            assert isinstance(file, FileObjectThread) and file.read(8) == pattern(8)
            assert file.threadpool is (_pool.thread_pool() if threadpool is None else pool)
            assert file.threadpool is not gevent.get_hub().threadpool
    assert len({threading.get_ident(), *used}) == 3
    pool.kill()


def test_file_object_of_ours_is_not_wrapped_twice(data_file):
    with greenaio.open(data_file, 'rb') as inner:
        file = FileObject(inner, 'rb', closefd=False)
        assert type(file) is FileObject
        assert file.read(16) == pattern(16)
        assert inner.tell() == 16
        file.close()
        assert inner.read(8) == pattern(24)[16:]


def test_closefd_false_leaves_it_open(folder):
    path = os.path.join(folder, 'kept')
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    with FileObject(fd, 'wb', closefd=False) as file:
        file.write(b'abc')
    del file
    gc.collect()
    assert os.pread(fd, 3, 0) == b'abc'
    os.close(fd)


def test_text_has_no_read1_and_binary_has(data_file):
    with FileObject(data_file, 'rb') as binary, FileObject(data_file, 'r', encoding='latin-1') as text:
        assert binary.read1(10) == pattern(16)[:10]
        assert not hasattr(text, 'read1')


def test_layers_are_those_of_io(data_file):
    with greenaio.open(data_file, 'r', encoding='latin-1') as file:
        assert type(file) is TextIOWrapper
        assert type(file.buffer) is BufferedReader
        assert type(file.buffer.raw) is FileIO


def test_direct_takes_any_position_and_size(folder):
    path = os.path.join(folder, 'direct')
    with greenaio.open(path, 'w+b', direct=True) as file:
        for i in range(100):
            file.write(b'%03d,' % i)
        file.seek(5)
        assert file.read(9) == b'01,002,00'
        file.seek(0, os.SEEK_END)
        file.write(b'end')
    assert os.path.getsize(path) == 403
    with greenaio.open(path, direct=True, dsync=True) as file:
        assert file.buffer.raw.file.direct
        assert file.read() == ''.join(f'{i:03},' for i in range(100)) + 'end'
    with pytest.raises(ValueError, match='path'):
        greenaio.open(0, direct=True)


def test_frozen_disk_stops_nobody(freezable):
    """A file object on it waits; the hub does not: it would until somebody else thaws the disk."""
    if os.path.isdir(freezable.path):
        pytest.skip('the calls below are tested there')
    run_python('''
        import gevent, os, signal, subprocess, sys
        from greenaio.fileobject import FileObject
        path, freeze, thaw = sys.argv[1:]
        files = [FileObject(path, 'rb') for _ in range(4)]
        rescue = subprocess.Popen(['sh', '-c', f'exec >&- 2>&-; sleep 10; {thaw}'])
        subprocess.run(freeze, shell=True, check=True)
        os.posix_fadvise(files[0].fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        jobs = [gevent.spawn(file.read, 10) for file in files] + [gevent.spawn(FileObject, path, 'rb')]
        for _ in range(300):
            gevent.sleep(0.001)
        assert not any(job.ready() for job in jobs[:-1])
        subprocess.run(thaw, shell=True, check=True)
        gevent.joinall(jobs, raise_error=True, timeout=10)
        jobs[-1].value.close()
        for file in files:
            file.close()
        rescue.kill()
    ''', freezable.path, *freezable.commands())


# Found by reading --------------------------------------------------------------------------------

def test_killed_while_text_is_flushed_no_line_of_another_is_lost(disk_folder):
    path = os.path.join(disk_folder, 'lines')
    accepted = []
    with greenaio.open(path, 'w') as file:
        def write(i):
            line = f'line {i}\n'
            file.write(line)
            accepted.append(line)

        for i in range(3000):
            writer = gevent.spawn(write, i)
            gevent.sleep(0)
            writer.kill()
    assert set(accepted) <= set(pathlib.Path(path).read_text().splitlines(True))
    assert len(accepted) > 2000


def test_shared_by_threads_without_a_hub(folder):
    path = os.path.join(folder, 'threads')
    failed = []
    with greenaio.open(path, 'w') as file:
        def write(i):
            try:
                for j in range(5000):
                    file.write(f'{i} {j}\n')
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            gevent.sleep(0.01)
    assert failed == []
    wanted = [f'{i} {j}' for i in range(4) for j in range(5000)]
    assert sorted(pathlib.Path(path).read_text().splitlines()) == sorted(wanted)


def test_close_that_was_timed_out_spoils_nothing(held_disk):
    with greenaio.open(held_disk.file, 'r+b', buffering=4096, direct=True, dsync=True) as file:
        held_disk.hold()
        writer = gevent.spawn(file.write, b'x' * 65536)
        gevent.sleep(0.05)
        with gevent.Timeout(0.1, False):
            file.close()
        assert not file.closed
        held_disk.release()
        assert writer.get(timeout=10) == 65536
        others = [gevent.spawn(file.tell) for _ in range(3)]
        gevent.joinall(others, raise_error=True, timeout=5)
        assert {other.value for other in others} == {65536}


# An exception that another greenlet throws into a wait: its class is that of an answer, and it is none.
THROWN = [TimeoutError('mine'), OSError(errno.ETIMEDOUT, 'mine'), OSError(errno.ENOSPC, 'mine'),
          BlockingIOError(errno.EAGAIN, 'mine'), InterruptedError(errno.EINTR, 'mine'), ValueError('mine'),
          MemoryError()]


@pytest.mark.parametrize('how', ['flush', 'close', 'write'])
@pytest.mark.parametrize('error', THROWN, ids=repr)
def test_timeout_of_any_class_is_no_answer_of_a_pipe(error, how):
    one, other = os.pipe()
    os.write(other, bytes(fcntl.fcntl(other, fcntl.F_SETPIPE_SZ, 4096)))     # now it is full
    file = greenaio.open(other, 'w', encoding='ascii')
    file.write('important ' * 100)
    calls = {'flush': file.flush, 'close': file.close, 'write': lambda: file.write('more ' * 10_000)}
    for _ in range(2):
        with pytest.raises(type(error)) as caught, gevent.Timeout(0.02, error):
            calls[how]()
        assert caught.value is error
        assert not file.closed
    got = bytearray()

    def read():
        while chunk := greenaio.os.read(one, 65536):
            got.extend(chunk)

    reader = gevent.spawn(read)
    file.close()
    reader.get(timeout=5)
    os.close(one)
    assert got.startswith(bytes(4096) + b'important ' * 100)
    assert bytes(got[5096:]) == b'more ' * (len(got[5096:]) // 5)


def outcome(call):
    """Of a greenlet: the exception that ends it, without its being printed."""
    try:
        return call()
    except BaseException as error:
        return error


def test_exception_of_any_class_is_no_answer_of_a_disk(held_disk):
    for error in THROWN:
        file = greenaio.open(held_disk.file, 'r+', encoding='ascii', direct=True, dsync=True)
        file.write('important ' * 410)
        held_disk.hold()
        for call in (file.flush, file.close, lambda write=file.write: write('more ' * 10_000), file.close):
            waiting = gevent.spawn(outcome, call)
            gevent.sleep(0.01)
            waiting.kill(error, block=False)
            assert waiting.get(timeout=5) is error
            with pytest.raises(type(error)) as caught, gevent.Timeout(0.01, error):
                call()
            assert caught.value is error
            assert not file.closed
        held_disk.release()
        file.close()
        assert pathlib.Path(held_disk.file).read_bytes().startswith(b'important ' * 410)


def test_timeout_while_it_waits_for_its_turn_is_no_answer(data_file):
    with greenaio.open(data_file, 'rb', buffering=0) as file, _turn.turn_of(file.fileno()):
        for error in THROWN:
            for call in (file.readall, lambda: file.read(100)):
                reader = gevent.spawn(outcome, call)
                gevent.sleep(0)
                reader.kill(error, block=False)
                assert reader.get(timeout=5) is error
    with open(data_file, 'rb') as plain, greenaio.open(data_file, 'rb') as file:
        assert file.read() == plain.read()


def test_error_of_the_disk_still_closes_the_file(tmp_path):
    """Of whatever class: only an exception that is thrown into a wait leaves the file open."""
    for error in (OSError(errno.EIO, 'mine'), ValueError('mine')):
        class Raw(FileIO):
            def write(self, data, error=error):
                raise error

        file = greenaio.fileobject.BufferedWriter(Raw(str(tmp_path / 'file'), 'w'), 100)
        file.write(b'lost')
        with pytest.raises(type(error)):
            file.close()
        assert file.closed and file.raw.closed


def test_who_queues_for_a_number_keeps_it(folder):
    """
    one                     two                     closer
    os.read(fd), its turn
                            os.write(fd), queues
                                                    os.close(fd)
    is done
                                                    opens another file: not with this number
                            writes, or gets EBADF
    """
    path, victim = os.path.join(folder, 'data'), os.path.join(folder, 'victim')
    for name, content in ((path, pattern(4 * MIB)), (victim, b'v' * 8192)):
        pathlib.Path(name).write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reader = gevent.spawn(greenaio.os.read, fd, 2 * MIB)
    writer = gevent.spawn(greenaio.os.write, fd, b'A' * 4096)
    gevent.sleep(0)
    greenaio.os.close(fd)
    opened = []
    while not (reader.ready() and writer.ready()):
        opened.append(os.open(victim, os.O_RDWR))
        gevent.sleep(0)
    for one in opened:
        os.close(one)
    assert pathlib.Path(victim).read_bytes() == b'v' * 8192


def test_reconfigure_takes_its_keywords(folder):
    path = os.path.join(folder, 'text')
    with greenaio.open(path, 'w') as file:
        file.reconfigure(line_buffering=True)
        file.write('line\n')
        assert pathlib.Path(path).read_text() == 'line\n'


def test_open_of_a_leased_file_does_not_stop_the_hub(folder):
    path = os.path.join(folder, 'leased')
    pathlib.Path(path).write_text('x')
    holder = subprocess.Popen([sys.executable, '-c', '''
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, lambda *_: (time.sleep(0.7), os._exit(0)))
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('leased', flush=True)
time.sleep(20)
''', path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'leased\n'
    ticks = []

    def tick():
        while True:
            gevent.sleep(0.001)
            ticks.append(1)

    ticker = gevent.spawn(tick)
    greenaio.os.close(greenaio.os.open(path, os.O_RDONLY))
    ticker.kill()
    holder.wait(10)
    holder.stdout.close()
    assert len(ticks) > 50


@pytest.mark.parametrize('code, status', [
    ("file = greenaio.open(writer, 'wb'); gevent.spawn(file.write, b'x' * 1000000)", 0),
    ("file = greenaio.open(writer, 'w'); gevent.spawn(print, 'x' * 1000000, file=file)", 0),
    ("gevent.spawn(greenaio.open(path, 'w').write, 'x' * 1000000)", 7),
])
def test_process_ends_though_a_greenlet_waits_in_a_write_to_a_pipe(tmp_path, code, status):
    path = tmp_path / 'fifo'
    os.mkfifo(path)
    done = run_python(f'''
import gevent, greenaio, os, sys
path = sys.argv[1]
reader, writer = os.pipe()
other = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
also = greenaio.open(path + '-beside', 'w')
also.write('beside')
{code}
gevent.sleep(0.1)
sys.exit({status})
''', path, timeout=20, check=False, env={'PYTHONWARNINGS': 'ignore'})
    assert (done.returncode, done.stderr) == (status, '')
    assert pathlib.Path(f'{path}-beside').read_text() == 'beside'


def test_detached_it_is_as_ios_and_holds_up_nobody_at_the_end(folder):
    path = os.path.join(folder, 'file')
    for mode in ('wb', 'w+b'):
        file = greenaio.open(path, mode)
        with file.detach(), pytest.raises(ValueError, match='raw stream has been detached'):
            file.flush()
    run_python('''
        import greenaio, sys
        detached = greenaio.open('/dev/null', 'wb')
        raw = detached.detach()
        class Last:
            def __init__(self):
                self.me = self          # a cycle: it goes after the modules
                self.files = [greenaio.open(f'{sys.argv[1]}{i}', 'w') for i in range(12)]
        sys.last_thing = Last()
        for file in sys.last_thing.files:
            file.write('flushed')
    ''', path, env={'PYTHONWARNINGS': 'ignore'})
    assert [os.path.getsize(f'{path}{i}') for i in range(12)] == [7] * 12


@pytest.mark.parametrize('data', [array.array('I', [1, 2]), 5, [65, 66], memoryview(b'abcdefgh').cast('I'),
                                  memoryview(b'abcdefgh')[::2], bytearray(b'abc'), 'text', b''])
def test_buffer_of_a_text_file_takes_what_ios_takes(folder, data):
    outcomes = []
    for opener in (open, greenaio.open):
        path = os.path.join(folder, opener.__module__)
        with opener(path, 'w') as file:
            try:
                outcomes.append(file.buffer.write(data))
            except Exception as error:
                outcomes.append(type(error))
        outcomes.append(pathlib.Path(path).read_bytes())
    assert outcomes[:2] == outcomes[2:]


@pytest.mark.parametrize('mode', ['w', 'wb'])
def test_who_resumes_a_pipe_that_would_block_writes_nothing_twice(mode):
    reader, writer = os.pipe()
    for fd in (reader, writer):
        os.set_blocking(fd, False)
    fcntl.fcntl(writer, 1031, 4096)     # F_SETPIPE_SZ
    lines = left = b''.join(b'%07d\n' % i for i in range(2500))
    received = b''
    with greenaio.open(writer, mode) as file, open(reader, 'rb', 0) as other:
        binary = file if mode == 'wb' else file.buffer
        while left:
            try:
                left = left[binary.write(left):]
            except BlockingIOError as error:
                left = left[error.characters_written:]
                received += other.read(65536) or b''
            assert len(received) <= len(lines)
        while len(received) < len(lines):
            with contextlib.suppress(BlockingIOError):
                binary.flush()
            received += other.read(65536) or b''
    assert received == lines


@pytest.mark.parametrize('options', [{'prefetch': 4}, {'direct': True}])
@pytest.mark.parametrize('buffering', [0, -1])
@pytest.mark.parametrize('who', ['hub', 'thread'])
def test_plain_write_is_seen_by_who_reads_ahead(disk_folder, options, buffering, who):
    path = os.path.join(disk_folder, 'data')
    pathlib.Path(path).write_bytes(b'o' * (4 * MIB))
    with greenaio.open(path, 'r+b', buffering, **options) as file:
        for _ in range(3):
            file.read(65536)
        at = file.tell()
        done = threading.Event()

        def write():
            file.seek(at + 9000)
            file.write(b'NEW')
            file.flush()
            file.seek(at)
            done.set()

        if who == 'hub':
            gevent.get_hub().loop.run_callback(write)
        else:
            threading.Thread(target=write).start()
        while not done.is_set():
            gevent.sleep(0.001)
        assert file.read(65536)[9000:9003] == b'NEW'


@pytest.mark.parametrize('mode', ['ab', 'a', 'wb', 'a+b'])
def test_pipe_that_is_opened_for_append_has_no_position(mode):
    for opener in (open, greenaio.open):
        reading, writing = os.pipe()
        try:
            file = opener(writing, mode, 0 if 'b' in mode else 1, closefd=False)
        except OSError as error:
            assert '+' in mode and error.errno == errno.ESPIPE, error   # both, for what has to be seekable
        else:
            with file:
                assert not file.seekable()
                file.write(b'x' if 'b' in mode else 'x\n')
            assert os.read(reading, 10) in (b'x', b'x\n')
        finally:
            os.close(reading)
            os.close(writing)


def test_no_bytes_of_a_pipe_take_no_time():
    (empty, _), (_, full) = pipes = os.pipe(), os.pipe()
    os.set_blocking(full, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(full, b'.' * 4096)
    os.set_blocking(full, True)
    with gevent.Timeout(5), greenaio.open(empty, 'rb', 0, closefd=False) as reader, \
            greenaio.open(full, 'wb', 0, closefd=False) as writer:
        assert reader.read(0) == b''
        assert reader.readinto(bytearray()) == 0
        assert writer.write(b'') == 0
        for nothing in ([], [bytearray()]):
            assert greenaio.os.readv(empty, nothing) == 0
            assert greenaio.os.writev(full, nothing) == 0
        assert greenaio.os.write(full, b'') == 0
    for fd in (*pipes[0], *pipes[1]):
        os.close(fd)


def test_opens_where_there_is_no_null_device(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    run_python('''
        import greenaio.fileobject, os, sys
        os.chroot(sys.argv[1])
        for mode in ('w', 'r+', 'ab', 'rb'):
            greenaio.open('/file', mode).close()
        for wrong in (dict(mode='q'), dict(newline='x'), dict(encoding='nope')):
            try:
                greenaio.open('/file', **wrong)
            except (ValueError, LookupError):
                pass
            else:
                raise AssertionError(wrong)
    ''', tmp_path)


def test_out_of_fds_the_error_names_the_file(data_file):
    run_python('''
        import greenaio, os, resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        with greenaio.open(sys.argv[1], 'rb'):
            pass
        held = []
        try:
            while True:
                held.append(os.open('/', os.O_RDONLY))
        except OSError:
            pass
        try:
            greenaio.open(sys.argv[1], 'r')
        except OSError as error:
            assert (error.errno, error.filename) == (24, sys.argv[1]), error
        else:
            raise AssertionError
    ''', data_file)


@pytest.mark.parametrize('mode, buffering', [('r', -1), ('rb', -1), ('wb', -1), ('r+b', -1), ('rb', 0)])
def test_forgotten_it_warns_as_io_does(tmp_path, monkeypatch, mode, buffering):
    """From the line that forgot it; and where that is an error, it is reported."""
    path = tmp_path / 'file'
    path.touch()
    with pytest.warns(ResourceWarning) as caught:
        greenaio.open(path, mode, buffering)
        gc.collect()
    assert [one.filename for one in caught] == [__file__]
    reported = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda what: reported.append(what.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter('error', ResourceWarning)
        greenaio.open(path, mode, buffering)
        gc.collect()
    assert reported == [ResourceWarning]


def test_warnings_about_arguments_are_the_callers(data_file):
    with pytest.warns(RuntimeWarning, match='line buffering') as caught:
        greenaio.open(data_file, 'rb', 1).close()
    assert [one.filename for one in caught] == [__file__]
    done = subprocess.run([sys.executable, '-X', 'warn_default_encoding', '-c',
                           'import greenaio, sys; greenaio.open(sys.argv[1]).close()', data_file],
                          capture_output=True, text=True, check=True)
    assert done.stderr.startswith('<string>:1: EncodingWarning')


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
def test_refused_file_object_leaves_nothing_open(data_file):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for wrong in ({'encoding': 'nope'}, {'newline': 'x'}):
            with pytest.raises((LookupError, ValueError)):
                FileObject(data_file, 'r', **wrong)
        gc.collect()
    assert caught == []
    with greenaio.open(data_file, 'rb') as inner:
        with pytest.raises(LookupError):
            FileObject(inner, 'r', encoding='nope')
        assert inner.read(8) == pattern(8)      # it is the caller's to close


@pytest.mark.parametrize('mode, buffering', [('r', -1), ('rb', -1), ('r+b', -1), ('rb', 0)])
def test_cannot_be_pickled_and_is_open_after_that(data_file, mode, buffering):
    with greenaio.open(data_file, mode, buffering) as file:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match='cannot pickle'):
                pickle.dumps(file, protocol)
        assert not file.closed


def test_raw_file_of_a_wrong_mode_is_not_emptied(data_file):
    for mode in ('w++', 'wr', 'rw+', 'ww', '+'):
        with pytest.raises(ValueError):
            FileIO(data_file, mode)
        assert os.path.getsize(data_file) == MIB


@pytest.mark.parametrize('mode', ['wb', 'w', 'r+b', 'r+'])
@pytest.mark.parametrize('layer', ['the file', 'its buffer', 'its raw file'])
@pytest.mark.parametrize('kind, args', [(OSError, ['no errno']), (OSError, [5, 'errno']), (ValueError, []),
                                        (SystemExit, []), (gevent.Timeout, [])])
def test_closing_a_file_whose_flush_was_replaced_closes_it(tmp_path, mode, layer, kind, args):
    """It raises what `io` raises; the bytes that `io` would drop are written."""
    def close(opener):
        calls = []

        def flush():
            calls.append(1)
            raise kind(*args)

        path = tmp_path / 'file'
        path.write_text('')
        file = opener(path, mode)
        buffer = getattr(file, 'buffer', file)
        {'the file': file, 'its buffer': buffer, 'its raw file': buffer.raw}[layer].flush = flush
        file.write('data' if 'b' not in mode else b'data')
        fd = file.fileno()
        with pytest.raises(kind) as caught:
            file.close()
        assert str(caught.value) == str(kind(*args))
        if not file.closed:             # a kill, for all that the text layer can tell: nothing may be dropped
            assert not issubclass(kind, Exception) and layer == 'its buffer' and 'b' not in mode
            del buffer.flush
            file.close()
        with pytest.raises(OSError):
            os.fstat(fd)
        return file.closed, buffer.closed, buffer.raw.closed, len(calls), path.read_text()

    plain, ours = close(open), close(greenaio.open)
    assert ours[:3] == plain[:3] == (True, True, True)
    assert (ours[3] >= plain[3] == 1 or layer == 'its buffer') and ours[4] == 'data'


def test_closing_a_file_calls_a_replaced_flush_once(tmp_path):
    for mode, layer in (('w', 'self'), ('wb', 'self'), ('w', 'raw'), ('wb', 'raw')):
        calls = []
        file = greenaio.open(tmp_path / 'file', mode)
        one = file if layer == 'self' else getattr(file, 'buffer', file).raw
        plain = one.flush
        one.flush = lambda: (calls.append(1), plain())      # noqa: B023
        file.write('data' if mode == 'w' else b'data')
        file.close()
        assert calls == [1], (mode, layer)
        assert (tmp_path / 'file').read_text() == 'data'


@pytest.mark.parametrize('forget', ["open(path, 'a').write(text)", "open(path, 'ab', 0).write(text.encode())",
                                    "greenaio.File(path, os.O_WRONLY).pwrite(text.encode(), 0)"])
def test_file_that_showwarning_forgets_is_not_reported_again(tmp_path, forget):
    run_python(f'''
        import gevent, greenaio, os, sys, warnings
        from greenaio import open
        gevent.get_hub()
        path, shown = sys.argv[1], []
        open(path, 'w').close()
        def show(message, *rest):
            text = str(message)
            shown.append(text[:8])
            {forget}
        warnings.simplefilter('always')
        warnings.showwarning = show
        def use():
            for _ in range(2):
                warnings.warn('first')
        use()
        assert shown == ['first', 'unclosed'] * 2, shown
        del shown[:]
        gevent.joinall([gevent.spawn(use) for _ in range(3)], raise_error=True)
        assert sorted(shown) == ['first'] * 6 + ['unclosed'] * 6, shown
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        {forget.replace('text', 'path')}
        assert len(shown) == 13, shown
    ''', tmp_path / 'file')


# Read whole --------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [{}, {'direct': True}, {'direct': True, 'prefetch': 0}, {'prefetch': 4}])
def test_file_read_whole_is_in_memory_once(disk_folder, options):
    path = os.path.join(disk_folder, 'large')
    with open(path, 'wb') as file:
        for i in range(64):
            file.write(bytes([i]) * MIB)
    run_program('read_whole', path, options)


@pytest.mark.parametrize('options', [{}, {'direct': True}, {'prefetch': 2}])
def test_read_whole_what_is_longer_or_shorter_than_it_says(folder, options):
    path = os.path.join(folder, 'file')
    for size in (0, 1, 4095, 4096, 4097, 262143, 262144, 262145, 3 * MIB + 5):
        content = (pattern(size + 8))[:size]
        pathlib.Path(path).write_bytes(content)
        with greenaio.open(path, 'rb', 0, **options) as raw, greenaio.open(path, 'rb', **options) as file:
            assert raw.read() == content == file.read()
            assert raw.read() == b''
            raw.seek(size // 2)
            assert raw.read() == content[size // 2:]
            raw.seek(size + 10)
            assert raw.read() == b''
            raw.seek(0)
            with open(path, 'ab') as other:
                other.write(b'more')
            assert raw.read() == content + b'more'
            raw.seek(0)
            os.truncate(path, size // 2)
            assert raw.read() == content[:size // 2]


def test_read_whole_of_files_whose_size_says_nothing():
    with open('/proc/self/mountinfo', 'rb') as wanted, greenaio.open('/proc/self/mountinfo', 'rb', 0) as file:
        assert file.read() == wanted.read()
    with greenaio.open('/sys/kernel/mm/transparent_hugepage/enabled', 'rb', 0) as file:
        assert b'[' in file.read() and file.read() == b''
    reader, writer = os.pipe()
    sent = pattern(MIB)
    with greenaio.open(reader, 'rb', 0) as file:
        def send():
            with greenaio.open(writer, 'wb', 0) as other:
                left = memoryview(sent)
                while left:
                    left = left[other.write(left):]
        sender = gevent.spawn(send)
        assert file.read() == sent
        sender.get()


def test_killed_while_it_reads_whole_it_gives_no_bytes_away(held_disk):
    with greenaio.open(held_disk.file, 'rb', 0, direct=True) as file:
        held_disk.hold()
        reader = gevent.spawn(file.read)
        gevent.sleep(0.05)
        reader.kill()
        assert isinstance(reader.value, gevent.GreenletExit)
        held_disk.release()
        file.seek(0)
        assert file.read(16) == pattern(16)


class Growing(FileIO):
    def readinto(self, buffer):
        n = super().readinto(buffer)
        if n and os.path.getsize(self.name) < 600000:
            with open(self.name, 'ab') as other:
                other.write(pattern(100000))
        return n


def test_read_whole_of_a_file_that_grows_meanwhile(folder):
    path = os.path.join(folder, 'file')
    pathlib.Path(path).write_bytes(pattern(80))
    with Growing(path) as file:
        data = file.read()
    assert data == pathlib.Path(path).read_bytes() and len(data) == 600080


@pytest.mark.parametrize('options', [{'direct': True}, {'direct': True, 'prefetch': 0}, {}], ids=str)
def test_killed_reader_of_a_whole_file_has_read_nothing(folder, options):
    path = os.path.join(folder, 'whole')
    with open(path, 'wb') as made:
        made.write(pattern(3 * MIB + 7))
    with greenaio.open(path, 'rb', 0, **options) as file:
        for i in range(20):
            file.seek(5)
            reader = gevent.spawn(file.read)
            gevent.sleep(i * 2e-4)
            reader.kill()
            if isinstance(reader.value, gevent.GreenletExit):
                assert file.tell() == 5
