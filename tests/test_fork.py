"""fork with requests in flight: the parent gets every event, the child works, nobody robs the other."""

import os

import pytest

from tests.support.processes import run_program, run_python

COMMON = '''
import errno, gevent, os, sys
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from greenaio._core import loop as _loop
from tests.programs.forking import *
'''


@pytest.fixture
def fork_file(data_file):
    return data_file


def test_child_does_its_own_io_while_the_parents_goes_on(fork_file):
    run_python(COMMON + '''
def child():
    gevent.joinall([gevent.spawn(read, i) for i in range(64)], raise_error=True)

for turn in range(5):
    greenlets = [gevent.spawn(read, i) for i in range(128)]
    gevent.sleep(0)
    pid = in_child(child)
    gevent.joinall(greenlets, raise_error=True, timeout=20)
    assert all(g.value == 'ok' for g in greenlets)
    wait(pid)
''', fork_file)


def test_idle_child_robs_the_parent_of_nothing(held_disk):
    """In flight while the child runs its inherited loop; released only afterwards."""
    import gevent

    from greenaio import File
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        held_disk.hold()
        greenlets = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(100)]
        gevent.sleep(0.05)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                gevent.reinit()
                gevent.get_hub().exception_stream = None
                gevent.sleep(0.3)       # the child's loop runs: it must not read the eventfd
                states = [type(g.exception).__name__ + str(getattr(g.exception, 'errno', ''))
                          for g in greenlets if g.ready()]
                # those that waited when we forked are told so
                status = 0 if states.count('OSError125') >= 50 else 2
            finally:
                os._exit(status)
        gevent.sleep(0.1)
        held_disk.release()
        gevent.joinall(greenlets, timeout=30, raise_error=True)
        assert all(len(greenlet.value) == 4096 for greenlet in greenlets)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            gevent.sleep(0.01)
        assert status == 0


def test_inherited_waiter_in_the_child_gets_ecanceled(fork_file):
    run_python(COMMON + '''
from tests.support.kernel import ScriptedContext
from greenaio._core.request import Request
driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=8)
memory = bytearray(512)
waiter = gevent.spawn(driver.perform_request, Request(0, 3, memory))
queued = gevent.spawn(driver.perform_request, Request(0, 3, bytearray(512)))
gevent.sleep(0.01)
def child():
    assert waiter.get(timeout=5) == -errno.ECANCELED
    assert queued.get(timeout=5) == -errno.ECANCELED
    read(3)
pid = in_child(child)
wait(pid)
driver.engine.context.finish()
driver.engine.context.finish()
assert waiter.get(timeout=5) == 512
assert queued.get(timeout=5) == 512
''', fork_file)


def test_child_does_not_take_for_read_what_the_parent_had_begun(fork_file):
    """It was read into memory that is wiped here."""
    run_python(COMMON + '''
read(0)                                 # so that it is known how this file is to be asked
for pause in (0, 0.1):                  # under way when it forks, perhaps; or done for sure
    memory = aligned_buffer(4096)
    begun = file.begin(True, memory, 4096)
    gevent.sleep(pause)
    def child():
        assert file.end(begun) == -errno.ECANCELED
        assert not any(memory)
    wait(in_child(child))
    assert file.end(begun) == 4096 and memory[:8] == (512).to_bytes(8, 'little')
''', fork_file)


def test_greenlet_woken_in_a_drain_pass_may_fork(fork_file):
    """The hub is inside its drain pass, in both processes, when the fork happens."""
    run_python(COMMON + '''
pids = []
parent = os.getpid()
def forker(i):
    read(i)
    if i % 16 == 5 and os.getpid() == parent:
        pids.append(in_child(lambda: [read(k) for k in range(20)]))
    read(i + 1)
greenlets = [gevent.spawn(forker, i) for i in range(64)]
gevent.joinall(greenlets, timeout=20)
if os.getpid() != parent:
    gevent.sleep(100)       # the child's copy of us: its forker is still at work
assert all(greenlet.successful() for greenlet in greenlets)
for pid in pids:
    wait(pid)
assert len(pids) == 4
''', fork_file)


def test_eight_generations(fork_file):
    run_python(COMMON + '''
def generation(n):
    gevent.joinall([gevent.spawn(read, i) for i in range(32)], raise_error=True)
    if n:
        greenlets = [gevent.spawn(read, i) for i in range(32)]
        gevent.sleep(0)
        pid = in_child(lambda: generation(n - 1))
        gevent.joinall(greenlets, raise_error=True, timeout=20)
        wait(pid)
generation(8)
''', fork_file)


def test_fork_that_python_hears_nothing_of_is_noticed(fork_file):
    """A fork by C code runs none of Python's hooks; a word that the kernel wipes tells the child."""
    run_python(COMMON + '''
import ctypes
read(1)
parent = _hub.get_driver().engine.context.eventfd
pid = in_child(lambda: (read(2), read(3)), fork=ctypes.CDLL(None).fork)
wait(pid)
read(4)
''', fork_file)


def test_pre_fork_server_works_in_every_worker(fork_file):
    run_python(COMMON + '''
read(0)
pids = [in_child(lambda: gevent.joinall([gevent.spawn(read, i) for i in range(100)], raise_error=True))
        for _ in range(4)]
for pid in pids:
    wait(pid)
''', fork_file)


def test_threads_way_works_in_a_child(fork_file):
    run_python(COMMON + '''
import greenaio.os
fd = os.open(path, os.O_RDONLY)
assert len(greenaio.os.pread(fd, 100, 0)) == 100
greenlet = gevent.spawn(greenaio.os.pread, fd, 100, 0)
gevent.sleep(0)
pid = in_child(lambda: [greenaio.os.pread(fd, 100, i) for i in range(10)])
assert len(greenlet.get(timeout=10)) == 100
wait(pid)
''', fork_file)


def test_part_that_was_cached_is_no_short_read_in_the_child(disk_folder):
    """It would be taken for the end of the file."""
    path = os.path.join(disk_folder, 'data')
    with open(path, 'wb') as data:
        data.write(bytes(65536))
        os.fsync(data.fileno())
    run_python(COMMON + '''
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
for read in (lambda: len(File.from_fd(fd).pread(32768, 0)),
             lambda: File.from_fd(fd).preadv([aligned_buffer(32768)], 0)):
    for _ in range(100):                # until the kernel really forgets the rest
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 4096, 0)
        reader = gevent.spawn(read)
        gevent.sleep(0)
        if not reader.ready():
            break
        gevent.sleep(0.01)
    def child():
        try:
            raise AssertionError(reader.get(timeout=10))
        except OSError as error:
            assert error.errno == errno.ECANCELED
    pid = in_child(child)
    assert reader.get(timeout=10) == 32768
    wait(pid)
''', path)


def test_waiter_with_its_data_in_wiped_memory_gets_ecanceled(fork_file):
    """Read in line, and the greenlet lets others have a turn: the child has zeros in that memory."""
    run_python(COMMON + '''
cached = File.from_fd(os.open(path, os.O_RDONLY), closefd=True)
memory = aligned_buffer(8192)

def read_on():
    expected = cached.pread(8192, 4096)
    while True:
        assert cached.preadv([memory], 4096) == 8192
        assert bytes(memory) == expected, 'wiped'

reader = gevent.spawn(read_on)
gevent.sleep(0)                 # it waits for nothing but its next turn

def child():
    reader.join(10)
    assert getattr(reader.exception, 'errno', None) == errno.ECANCELED, reader.exception

wait(in_child(child))
assert not reader.dead
reader.kill()
''', fork_file)


@pytest.mark.parametrize('cached', ['all', 'a part'])
def test_reader_killed_in_the_child_leaves_the_parent_its_position(held_disk, cached):
    """They share it. Who is killed gives back what the page cache had; not so a copy of it."""
    run_program('killed_in_the_child', held_disk.file, cached, *held_disk.commands())


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv-cffi'])
def test_child_that_destroys_its_hub_after_a_fork_in_c_robs_the_parent_of_nothing(fork_file, loop):
    """It has used nothing of greenaio, which could have noticed."""
    run_python(COMMON + '''
import ctypes
fork = ctypes.PyDLL(None).fork
for _ in range(2):
    greenlets = [gevent.spawn(read, i) for i in range(60)]
    gevent.sleep(0)
    pid = fork()
    if pid == 0:
        gevent.get_hub().destroy()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    gevent.joinall(greenlets, raise_error=True, timeout=10)
    assert all(greenlet.ready() for greenlet in greenlets)
''', fork_file, env={'GEVENT_LOOP': loop})


def test_child_that_exits_disturbs_nothing(fork_file):
    run_python(COMMON + '''
for turn in range(10):
    greenlets = [gevent.spawn(read, i) for i in range(100)]
    gevent.sleep(0)
    pid = os.fork()
    if pid == 0:
        sys.exit(0)         # interpreter shutdown, destructors and all
    gevent.joinall(greenlets, raise_error=True, timeout=20)
    assert os.waitpid(pid, 0)[1] == 0
''', fork_file)


def test_aligned_buffer_reads_as_zeros_in_the_child():
    run_python('''
import os
from greenaio import aligned_buffer
buffer = aligned_buffer(10000)
buffer[:] = b'x' * 10000
pid = os.fork()
if pid == 0:
    os._exit(0 if bytes(buffer) == bytes(10000) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert bytes(buffer) == b'x' * 10000
''')
