"""The position that an open file has in the kernel, and the turns that greenlets take with it."""

import os

import gevent
import greenlet
import pytest

import greenaio
import greenaio.os
from tests.support import missing
from tests.support.disks import FreezableDisk, pattern
from tests.support.processes import CONTROL, run_program, run_python

WRITERS = '''
from tests.programs.writers import *
import gevent, os, subprocess, sys
'''

FORKED_WRITERS = '''
children = []
for name in (b'a', b'b', b'c'):
    pid = os.fork()
    if pid == 0:
        gevent.sleep(0.01)
        write(name)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
check([b'a', b'b', b'c'])
'''

SUBPROCESS = '''
other = subprocess.Popen([sys.executable, '-c', OTHER, str(lines)], stdout=fd)
until_it_writes(other)
write(b'own')
other.wait()
check([b'own', b'other'])
'''

SUBPROCESS_AND_OBJECT = '''
file = os.fdopen(os.dup(fd), 'w', 1)
other = subprocess.Popen([sys.executable, '-c', OTHER, str(lines)], stdout=fd)
until_it_writes(other)
for i in range(lines):
    print(line(b'own', i).decode(), end='', file=file)
file.close()
other.wait()
check([b'own', b'other'])
'''

NATIVE_THREAD = '''
done = []
def in_thread():
    write(b'thread')
    done.append(True)
gevent.monkey.get_original('_thread', 'start_new_thread')(in_thread, ())
gevent.joinall([gevent.spawn(write, b'a'), gevent.spawn(write, b'b')])
while not done:
    gevent.sleep(0.01)
check([b'thread', b'a', b'b'])
'''

THREAD_POOL = '''
thread = gevent.get_hub().threadpool.spawn(write, b'thread')
gevent.joinall([gevent.spawn(write, b'a'), gevent.spawn(write, b'b')])
thread.get()
check([b'thread', b'a', b'b'])
'''

STANDARD_OUTPUT = '''
saved = os.dup(1)
os.dup2(fd, 1)
def printer():
    for i in range(lines):
        print(line(b'print', i).decode(), end='', flush=True)
        gevent.sleep(0)
def writer():
    for i in range(lines):
        os.write(1, line(b'write', i))
gevent.joinall([gevent.spawn(printer), gevent.spawn(writer)])
os.dup2(saved, 1)
check([b'print', b'write'])
'''


def lost_lines(program, folder):
    return int(run_python(WRITERS + program, os.path.join(folder, 'log')).stdout)


@pytest.mark.parametrize('program', [
    pytest.param(FORKED_WRITERS, id='forked workers'),
    pytest.param(STANDARD_OUTPUT, id='standard output'),
])
def test_writers_that_share_a_position_lose_no_line(folder, program):
    assert lost_lines(program, folder) == 0


@pytest.mark.parametrize('program', [
    pytest.param(SUBPROCESS, id='a subprocess'),
    pytest.param(SUBPROCESS_AND_OBJECT, id='a subprocess beside a file object'),
    pytest.param(NATIVE_THREAD, id='a native thread'),
    pytest.param(THREAD_POOL, id='the thread pool of gevent'),
])
def test_writers_of_two_kinds_lose_no_line(disk_folder, program):
    """On a disk a write waits for a thread, and the other writer moves the position during that time."""
    assert lost_lines(program, disk_folder) == 0


def test_forked_readers_of_one_position_take_each_record_once(folder):
    done = run_program('forked_readers', os.path.join(folder, 'records'))
    assert int(done.stdout) == 0, f'{done.stdout.strip()} records are taken twice'


@pytest.mark.parametrize('call', ['file.read(10)', 'file.seek(0)', 'greenaio.os.read(file.fileno(), 10)'])
def test_process_that_reads_at_the_position_of_a_frozen_disk_does_not_stop_the_hub(tmp_path, call):
    """The other process has the lock of the position, inside read(2), until the disk thaws."""
    if os.geteuid() != 0:
        missing('needs root')
    disk = FreezableDisk(str(tmp_path), 'ext4', '64M')
    try:
        path = os.path.join(disk.path, 'data')
        with open(path, 'wb') as file:
            file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        freeze, thaw = disk.commands()
        done = run_program('shared_position', path, freeze, thaw, call, CONTROL)
        gap, control = map(float, done.stdout.split())
        assert gap - control < 0.05, f'the hub stood still for {gap:.2f} s'
    finally:
        disk.close()


KNOWN_TO_THE_KERNEL = [
    'os.dup(fd)', 'os.dup2(fd, 100)', 'os.set_inheritable(fd, True)', 'socket.send_fds(one, [b"x"], [fd])',
    'subprocess.Popen(["true"], stdin=fd).wait()', 'subprocess.run(["true"], pass_fds=[fd])',
    'subprocess.run(["true"], stdin=file)', 'os.waitpid(os.fork() or os._exit(0), 0)', 'os.close(fd)',
]


@pytest.mark.parametrize('call', KNOWN_TO_THE_KERNEL)
def test_number_is_ours_until_it_is_copied_or_passed_on(folder, call):
    """A process that starts another program shares nothing else with it."""
    run_python('''
import gevent.monkey
gevent.monkey.patch_all(greenaio=True)
import gevent, os, socket, subprocess, sys
gevent.get_hub()
from greenaio._files.sharing import is_ours
path = sys.argv[1]
file, other = open(path, 'wb', 0), open(path, 'rb')
fd = file.fileno() if 'file' in sys.argv[2] else os.open(path, os.O_RDONLY)
one, two = socket.socketpair()
subprocess.run(['true'])
assert is_ours(fd) and is_ours(other.fileno())
eval(sys.argv[2])
assert not is_ours(fd)
assert is_ours(other.fileno()) == ('fork' not in sys.argv[2])
''', os.path.join(folder, 'data'), call)


def test_number_that_the_program_knows_is_not_ours_where_no_call_is_watched(folder):
    run_python('''
import os, sys, greenaio
from greenaio._files.sharing import is_ours
with greenaio.open(sys.argv[1], 'wb') as file:
    assert is_ours(file.raw._fd)
    file.raw.tell()
    assert not is_ours(file.fileno())
''', os.path.join(folder, 'data'))


# Kills -------------------------------------------------------------------------------------------

def kill_reader(held_disk, fd):
    """Kill a greenlet while a thread reads for it at the position of *fd*, of which nothing is cached."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    held_disk.hold()
    reader = gevent.spawn(greenaio.os.read, fd, 4096)
    gevent.sleep(0.05)
    assert not reader.ready()
    reader.kill()


def test_killed_reader_of_a_number_that_is_ours_has_read_nothing(held_disk):
    fd = greenaio.os.open(held_disk.file, os.O_RDONLY)
    kill_reader(held_disk, fd)
    following = gevent.spawn(greenaio.os.read, fd, 10)
    gevent.sleep(0.05)
    assert not following.ready()        # it takes its turn after the thread
    held_disk.release()
    assert following.get(timeout=10) == pattern(16)[:10]
    greenaio.os.close(fd)


def test_killed_reader_of_a_shared_position_loses_what_it_read(held_disk):
    """As a killed thread: another process may have read on."""
    fd = os.open(held_disk.file, os.O_RDONLY)
    kill_reader(held_disk, fd)
    following = gevent.spawn(greenaio.os.read, fd, 10)
    held_disk.release()
    assert following.get(timeout=10) == pattern(4112)[4096:4106]
    os.close(fd)


def test_killed_reader_that_no_thread_had_begun_with_loses_nothing(held_disk):
    fd = os.open(held_disk.file, os.O_RDONLY)
    kill_reader(held_disk, fd)
    others = [gevent.spawn(greenaio.os.read, fd, 10) for _ in range(2)]
    gevent.sleep(0.05)
    gevent.killall(others)
    held_disk.release()
    assert greenaio.os.read(fd, 10) == pattern(4112)[4096:4106]
    os.close(fd)


def test_position_is_asked_for_after_the_write_of_a_killed_greenlet(held_disk):
    """Until the thread has returned, an lseek of the hub would wait for the disk."""
    with greenaio.open(held_disk.file, 'r+b', 0, dsync=True) as file:
        held_disk.hold()
        writer = gevent.spawn(file.write, bytes(4096))
        gevent.sleep(0.05)
        assert not writer.ready()
        writer.kill()
        asking = gevent.spawn(file.tell)
        gevent.sleep(0.05)
        assert not asking.ready()
        held_disk.release()
        assert asking.get(timeout=10) == 4096


def test_thread_shows_the_position_to_the_kernel(held_disk):
    """gunicorn and sendfile ask for it with lseek."""
    fd = greenaio.os.open(held_disk.file, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert len(greenaio.os.read(fd, 100)) == os.lseek(fd, 0, os.SEEK_CUR) == 100
    assert len(greenaio.os.read(fd, 200)) + 100 == os.lseek(fd, 0, os.SEEK_CUR) == 300
    greenaio.os.write(fd, bytes(50))
    assert os.lseek(fd, 0, os.SEEK_CUR) == 350
    assert greenaio.os.readv(fd, [bytearray(50), bytearray(100)]) == 150
    assert os.lseek(fd, 0, os.SEEK_CUR) == 500
    greenaio.os.close(fd)


def test_line_that_print_makes_by_several_calls_stays_whole(disk_folder):
    """The greenlet does not park between the calls, so as with plain gevent no other line gets in."""
    path = os.path.join(disk_folder, 'lines')

    def work(k):
        for i in range(50):
            print('worker', k, 'item', i, file=file)
            gevent.sleep(0)

    with greenaio.open(path, 'w', 1) as file:
        gevent.joinall([gevent.spawn(work, k) for k in range(3)], raise_error=True)
    with greenaio.open(path) as file:
        lines = file.read().splitlines()
    whole = {f'worker {k} item {i}' for k in range(3) for i in range(50)}
    assert sorted(lines) == sorted(whole)


def test_who_appends_is_told_where_its_own_record_ends(disk_folder):
    path = os.path.join(disk_folder, 'records')
    told = []

    def work(k):
        with greenaio.open(path, 'ab', 0) as file:
            for i in range(50):
                file.write(b'%d %08d|' % (k, i) * 10)
                told.append((file.tell(), b'%d %08d|' % (k, i) * 10))

    gevent.joinall([gevent.spawn(work, k) for k in range(4)], raise_error=True)
    with greenaio.open(path, 'rb') as file:
        data = file.read()
    assert all(data[end - len(record):end] == record for end, record in told)


# Turns -------------------------------------------------------------------------------------------

def switches_while(seconds):
    """How many switches into greenlets there are during so many seconds."""
    count = 0

    def trace(event, _):
        nonlocal count
        count += event == 'switch'

    before = greenlet.settrace(trace)
    try:
        gevent.sleep(seconds)
    finally:
        greenlet.settrace(before)
    return count


@pytest.mark.parametrize('what', ['a file object', 'a number'])
def test_greenlets_that_wait_for_their_turn_cost_nothing(held_disk, what):
    with greenaio.open(held_disk.file, 'r+b', 0, direct=True, prefetch=0) as file:
        held_disk.hold()
        if what == 'a number':
            jobs = [gevent.spawn(greenaio.os.write, file.fileno(), bytes(4096)) for _ in range(50)]
        else:
            jobs = [gevent.spawn(file.write, bytes(4096)) for _ in range(50)]
        try:
            gevent.sleep(0.1)
            assert switches_while(0.2) < 20
        finally:
            held_disk.release()
            gevent.joinall(jobs, timeout=20)


def test_greenlet_that_waits_for_its_turn_starts_no_timeout(held_disk, monkeypatch):
    """The exception of a timeout that a signal handler interrupts could appear in the code of the user."""
    started = []
    plain = gevent.Timeout._start_new_or_dummy

    def start(timeout, exception=None):
        if timeout is not None:
            started.append(timeout)
        return plain(timeout, exception)

    with greenaio.open(held_disk.file, 'r+b', 0, direct=True, prefetch=0) as file:
        held_disk.hold()
        jobs = [gevent.spawn(file.write, bytes(4096)) for _ in range(2)]
        try:
            monkeypatch.setattr(gevent.Timeout, '_start_new_or_dummy', staticmethod(start))
            gevent.sleep(0.1)
            assert not started
        finally:
            monkeypatch.undo()
            held_disk.release()
            gevent.joinall(jobs, timeout=20)


def test_signal_handler_that_writes_to_files_in_use_ends_and_so_do_the_greenlets(tmp_path):
    run_program('interrupted_turn', tmp_path, timeout=8)
