"""One file, many greenlets and threads; and who ends in the middle: killed, forked, with the interpreter."""

import errno
import os
import pathlib
import sys
import threading
import time

import gevent
import gevent.monkey
import pytest
from greenlet import getcurrent

import greenaio
import greenaio.os
from greenaio._files import copies
from greenaio._files import loop as _loop
from greenaio._files import turn as _turn
from greenaio.fileobject import open as open_file
from tests.support.disks import MIB
from tests.support.processes import run_program, run_python

native_sleep = gevent.monkey.get_original('time', 'sleep')

@pytest.fixture
def pipe():
    """A pipe that holds 64 KiB: the fds to read and to write; closed here unless the test does."""
    fds = os.pipe()
    yield fds
    for fd in fds:
        greenaio.os.close(fd) if fd_is_open(fd) else None


@pytest.fixture
def often_preempted():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def fd_is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def run_threads(*functions):
    """Run each in a thread with a hub of its own while ours goes on; return their errors."""
    errors = []

    def run(function):
        try:
            gevent.get_hub()
            function()
        except BaseException as error:
            errors.append(error)
        finally:
            gevent.get_hub().destroy()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < deadline, 'a thread hangs'
        gevent.sleep(0.01)
    return errors


# Turns -------------------------------------------------------------------------------------------

def test_threads_that_share_a_number_lose_nothing(folder, often_preempted):
    """Its position is one, and each write has a place of its own."""
    path = os.path.join(folder, 'shared')
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    each = 1500

    def write(who):
        def work():
            for i in range(each):
                greenaio.os.write(fd, b'%d %06d\n' % (who, i))
        return work

    try:
        assert run_threads(*(write(who) for who in range(4))) == []
    finally:
        os.close(fd)
    lines = pathlib.Path(path).read_bytes().splitlines()
    assert sorted(lines) == sorted(b'%d %06d' % (who, i) for who in range(4) for i in range(each))


@pytest.mark.parametrize('is_alone', [True, False])
def test_turn_is_not_lost_on_a_waiter_that_gives_up_when_it_is_woken(is_alone):
    """
    owner, thread 1                             waiter, thread 2
                                                waits
    leaves, looks for the first in the queue
                                                its Timeout comes: it goes
    wakes it, in vain
    """
    class Preempted(list):
        def __iter__(self):
            for one in list.__iter__(self):
                if threading.get_ident() == owners[0]:
                    native_sleep(0.3)
                yield one

    turn = _turn.Turn()
    turn.queue = Preempted()
    waits = threading.Event()
    owners = [0]

    def owner():
        turn.owner = getcurrent()
        waits.wait(10)
        native_sleep(0.1)
        owners[0] = threading.get_ident()
        turn.leave()
        owners[0] = 0

    def waiter():
        while turn.owner is None:
            gevent.sleep(0.001)
        waits.set()
        with gevent.Timeout(0.25, False):
            turn.wait()
            raise AssertionError('it had the turn before the Timeout')

    def behind():
        while not turn.queue:
            gevent.sleep(0.001)
        with gevent.Timeout(10):
            assert turn.wait()
        turn.leave()

    assert run_threads(owner, waiter, *[] if is_alone else [behind]) == []
    assert turn.owner is None and not turn.queue


def test_owner_whose_thread_has_ended():
    """The turn of a number passes on. That of a file does not: the lock inside it is held for ever, and who
    waited for that would stop its whole thread."""
    run_program('owner_of_ended_thread')


TURN_AND_THREAD = '''
import errno, gevent, os, sys
from greenaio._files import position as _position, turn as _turn, waiter as _waiter
from tests.programs.turn_and_thread import *
'''


@pytest.mark.parametrize('how', ['thread', 'hub'])
@pytest.mark.parametrize('kind', ['file', 'number'])
@pytest.mark.parametrize('is_alone', [True, False])
def test_waiter_whose_thread_or_hub_ends_is_not_given_the_turn(disk_folder, how, kind, is_alone):
    run_python(TURN_AND_THREAD + '''
how, kind = sys.argv[2:4]
is_alone = sys.argv[4] == 'True'
turn = file._io_turn if kind == 'file' else _turn.turns.setdefault(fd, _turn.Turn())
turn.owner = gevent.getcurrent()
waiters = []
in_thread_that_ends(how, lambda: [gevent.spawn(turn.wait) for _ in range(2)],
                    lambda: waiters.extend(turn.queue))
assert len(waiters) == 2 and not turn.queue
if is_alone:
    turn.leave()
    assert turn.owner is None and not turn.queue
else:
    behind = gevent.spawn(turn.wait)
    gevent.sleep(0)
    turn.leave()
    behind.join(10)
    assert behind.ready() and turn.owner is behind
    turn.leave()
assert not _waiter._waiters
has_its_turn(file.write if kind == 'file' else (lambda data: _position.write(fd, data)), b'x')
os._exit(0)
''', f'{disk_folder}/data', how, kind, is_alone)


@pytest.mark.parametrize('how', ['thread', 'hub'])
def test_turn_passes_on_if_the_greenlet_that_was_woken_for_it_ends_before_it_goes_on(disk_folder, how):
    run_python(TURN_AND_THREAD + '''
turn = file._io_turn
turn.owner = me = gevent.getcurrent()
def leave():
    assert turn.queue
    turn.leave()
    assert turn.owner is _turn.LEFT     # the waiter was woken, and has not gone on

in_thread_that_ends(sys.argv[2], turn.wait, leave)
assert turn.owner is None
has_its_turn(file.write, b'x')
os._exit(0)
''', f'{disk_folder}/data', how)


def test_number_whose_user_had_a_hub_that_was_destroyed(disk_folder):
    """It is taken over, by users of the same file, and of the one that gets the number later."""
    run_python(TURN_AND_THREAD + '''
def stuck():
    with _turn.turn_of(fd):
        gevent.sleep(60)

in_thread_that_ends('hub', stuck)
assert _turn.turns[fd].owner is keep[0]
has_its_turn(_position.write, fd, b'x')
turn = file._io_turn
turn.owner = keep[0]                    # which is inside: nobody else may ever be
try:
    file.write(b'x')
except OSError as error:
    assert error.errno == errno.EOWNERDEAD
else:
    raise AssertionError('it had its turn')
os._exit(0)
''', f'{disk_folder}/data')


@pytest.mark.parametrize('who', ['thread', 'hub'])
@pytest.mark.parametrize('direct', [False, True])
def test_raw_file_that_a_greenlet_writes(folder, who, direct):
    """Whoever cannot wait in a loop waits natively, or is told; its bytes land beside the greenlet's."""
    path = os.path.join(folder, 'raw')
    n = 16 * MIB
    others = []

    def other():
        try:
            others.append(file.write(b'B' * 4096))
        except BaseException as error:
            others.append(type(error))

    def write():
        file.write(b'A' * n)
        file.flush()

    with open_file(path, 'wb', buffering=0, direct=direct) as file:
        greenlet = gevent.spawn(write)
        while not (turn := _turn.turns.get(file.fileno())) or turn.owner is None:
            gevent.sleep(0)
            assert not greenlet.ready()
        if who == 'thread':
            thread = threading.Thread(target=other)
            thread.start()
            while thread.is_alive():
                gevent.sleep(0.01)
            wanted = [4096]
        else:
            gevent.get_hub().loop.run_callback(other)
            wanted = [gevent.exceptions.BlockingSwitchOutError]
        greenlet.get(timeout=30)
    assert others == wanted
    data = pathlib.Path(path).read_bytes()
    assert (data.count(b'A'), data.count(b'B')) == (n, 4096 if who == 'thread' else 0)


def test_read_after_a_write_of_another_sees_it(folder):
    """The write waits for its turn behind a read, which reads ahead again: what was read then is old."""
    path, block = os.path.join(folder, 'stale'), 128 << 10
    pathlib.Path(path).write_bytes(b'o' * (64 * block))
    with open_file(path, 'r+b', buffering=0, direct=True, prefetch=8) as file:
        def write():
            file.write(b'N' * block)
            file.flush()

        greenlets = [gevent.spawn(file.read, block), gevent.spawn(write)]
        gevent.joinall(greenlets, timeout=10, raise_error=True)
        file.seek(block)
        assert file.read(block) == b'N' * block


# Pipes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('first', ['drained', 'closed'])
def test_number_that_is_closed_while_its_writer_waits_gets_nothing(pipe, folder, first):
    reader, writer = pipe
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b'.' * 4096)
    os.set_blocking(writer, True)
    path, signal = os.path.join(folder, 'victim'), os.pipe()
    file = open_file(writer, 'wb', buffering=0)
    opened = []

    def close():
        _loop.wait_for(signal[0], 1)
        file.close()
        while not opened or opened[-1] < writer:        # the lowest number that is free
            opened.append(os.open(path, os.O_RDWR | os.O_CREAT))

    tasks = [(file.write, b'SECRET'), (close,)]
    greenlets = [gevent.spawn(*task) for task in (tasks if first == 'drained' else tasks[::-1])]
    gevent.sleep(0.05)
    steps = [lambda: os.read(reader, 1 << 20), lambda: os.write(signal[1], b'x')]
    for step in steps if first == 'drained' else steps[::-1]:
        step()                          # both in one turn of the loop
    gevent.joinall(greenlets, timeout=10)
    assert all(greenlet.ready() for greenlet in greenlets)
    assert pathlib.Path(path).read_bytes() == b''
    for fd in (*opened, *signal):
        os.close(fd)


@pytest.mark.parametrize('mode', ['w', 'wb'])
@pytest.mark.parametrize('end', ['timeout', 'kill'])
def test_what_a_pipe_took_before_the_end_is_not_written_twice(pipe, mode, end):
    reader, writer = pipe
    lines = ''.join(f'{i:07}\n' for i in range(16384))
    file = open_file(writer, mode, buffering=-1 if mode == 'w' else 1 << 18)

    def write():
        file.write(lines if mode == 'w' else lines.encode())
        file.flush()

    if end == 'timeout':
        with gevent.Timeout(0.1, False):
            write()
    else:
        greenlet = gevent.spawn(write)
        gevent.sleep(0.1)
        greenlet.kill()
    received = []

    def receive():
        while data := greenaio.os.read(reader, 65536):
            received.append(data)

    receiver = gevent.spawn(receive)
    file.close()
    receiver.get(timeout=10)
    assert b''.join(received).decode() == lines


def test_timeout_in_close_loses_nothing(pipe):
    reader, writer = pipe
    file = open_file(writer, 'wb', buffering=1 << 18)
    file.write(b'x' * (1 << 17))
    with gevent.Timeout(0.05, False):
        file.close()
    assert not file.closed
    received = []

    def receive():
        while data := greenaio.os.read(reader, 65536):
            received.append(data)

    receiver = gevent.spawn(receive)
    file.close()
    assert file.closed
    receiver.get(timeout=10)
    assert len(b''.join(received)) == 1 << 17


def test_close_that_fails_closes():
    """And says so once, as io does."""
    file = open_file('/dev/full', 'wb')
    file.write(b'x')
    with pytest.raises(OSError) as caught:
        file.close()
    assert caught.value.errno == errno.ENOSPC and file.closed
    file.close()


def test_two_close_and_one_is_killed(pipe):
    reader, _ = pipe
    file = open_file(reader, 'rb')
    readers = [gevent.spawn(file.read, 5) for _ in range(2)]
    gevent.sleep(0.02)

    closers = [gevent.spawn(file.close) for _ in range(2)]
    gevent.sleep(0)
    closers[0].kill(block=False)
    gevent.joinall(readers + closers, timeout=5)
    assert file.closed
    assert [type(one.exception) for one in readers] == [gevent._fileobjectcommon.cancel_wait_ex] * 2


# Forks -------------------------------------------------------------------------------------------

def test_child_does_not_write_what_is_the_parents(disk_folder):
    """The memory of a request is wiped in a child, where the greenlet that waits for it finds ECANCELED."""
    path = os.path.join(disk_folder, 'forked')
    run_program('forked_writer', path)


@pytest.mark.parametrize('fork', ['os.fork', 'gevent.os.fork_gevent'])
def test_greenlets_that_queue_go_on_in_a_child(fork):
    run_python(f'''
import gevent, gevent.os, os, warnings
warnings.simplefilter('ignore', DeprecationWarning)
from greenaio.fileobject import open as open_file
r, w = os.pipe()
file = open_file(r, 'rb')
old = [gevent.spawn(file.read, 4) for _ in range(2)]
gevent.sleep(0.05)
pid = {fork}()
if pid == 0:
    try:
        gevent.sleep(0.05)
        all = old + [gevent.spawn(file.read, 4) for _ in range(2)]
        gevent.sleep(0.05)
        os.write(w, b'aaaabbbbccccdddd')
        gevent.joinall(all, timeout=5)
        os._exit(0 if [one.value for one in all] == [b'aaaa', b'bbbb', b'cccc', b'dddd'] else 1)
    finally:
        os._exit(2)
assert os.waitpid(pid, 0)[1] == 0
os._exit(0)                     # the parent's readers wait for ever
''')


def test_file_that_another_thread_used_when_the_process_forked():
    """Its lock is held in the child for ever: an error, where io itself stops the child."""
    run_python('''
import errno, gevent, os, threading, warnings
warnings.simplefilter('ignore', DeprecationWarning)
from greenaio.fileobject import open as open_file
r, w = os.pipe()
file = open_file(r, 'rb')
threading.Thread(target=file.read, args=(4,), daemon=True).start()
while file._io_turn.owner is None:
    gevent.sleep(0.01)
gevent.sleep(0.05)
pid = os.fork()
if pid == 0:
    try:
        file.read(4)
    except OSError as error:
        os._exit(0 if error.errno == errno.EOWNERDEAD else 1)
    finally:
        os._exit(2)
assert os.waitpid(pid, 0)[1] == 0
os._exit(0)
''', timeout=20)


# Ends --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('wrapped', [
    'io.TextIOWrapper(open_file(path, "wb"))',
    'io.TextIOWrapper(io.BufferedWriter(open_file(path, "wb", buffering=0)))',
    'io.TextIOWrapper(io.BufferedWriter(open_file(path, "wb", buffering=0, direct=True)))',
    'fileobject.TextIOWrapper(fileobject.BufferedWriter(fileobject.FileIO(path, "w")))',
])
def test_layers_of_others_are_flushed_at_the_interpreters_end(folder, wrapped):
    path = os.path.join(folder, 'end')
    run_python(f'''
import io, sys, gevent
from greenaio import fileobject
from greenaio.fileobject import open as open_file
gevent.sleep(0)
path = sys.argv[1]
file = {wrapped}
file.write('bye')
''', path)
    assert pathlib.Path(path).read_text() == 'bye'


def test_copy_that_is_killed_leaves_nobody_behind(folder, monkeypatch):
    path = os.path.join(folder, 'source')
    pathlib.Path(path).write_bytes(os.urandom(MIB) * 32)

    class Enough(Exception):
        pass

    def stop(done, size):
        raise Enough

    ahead = []

    def readahead(*_):
        ahead.append(gevent.getcurrent())
        gevent.sleep(100)

    monkeypatch.setattr(copies._calls, 'readahead', readahead)
    with pytest.raises(Enough):
        copies.copyfile(path, path + '.copy', progress=stop)
    gevent.joinall(ahead, timeout=5)
    assert [one.dead for one in ahead] == [True]
