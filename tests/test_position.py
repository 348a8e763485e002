"""The position that an open file has in the kernel, and the turns that greenlets take with it.

Each `known_fault` is one of today's code. The rebuilt handle has to make these tests pass.
"""

import os

import gevent
import greenlet
import pytest

import greenaio
import greenaio.os
from tests.support import known_fault, missing
from tests.support.disks import FreezableDisk
from tests.support.processes import CONTROL, run_program, run_python

SHARED = known_fault('a write at the position is an lseek, a positional write and an lseek; '
                     'another writer moves the position between them')

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


@SHARED
@pytest.mark.parametrize('program', [
    pytest.param(FORKED_WRITERS, id='forked workers'),
    pytest.param(STANDARD_OUTPUT, id='standard output'),
])
def test_writers_that_share_a_position_lose_no_line(folder, program):
    assert lost_lines(program, folder) == 0


@SHARED
@pytest.mark.parametrize('program', [
    pytest.param(SUBPROCESS, id='a subprocess'),
    pytest.param(SUBPROCESS_AND_OBJECT, id='a subprocess beside a file object'),
    pytest.param(NATIVE_THREAD, id='a native thread'),
    pytest.param(THREAD_POOL, id='the thread pool of gevent'),
])
def test_writers_of_two_kinds_lose_no_line(disk_folder, program):
    """On a disk a write waits for a thread, and the other writer moves the position during that time."""
    assert lost_lines(program, disk_folder) == 0


@SHARED
def test_forked_readers_of_one_position_take_each_record_once(folder):
    done = run_program('forked_readers', os.path.join(folder, 'records'))
    assert int(done.stdout) == 0, f'{done.stdout.strip()} records are taken twice'


@known_fault('lseek and preadv2(-1) of the hub wait for the lock of the position')
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


@known_fault('after an append the position is set to the end of the file, which others have moved')
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
