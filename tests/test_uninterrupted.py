"""Inside `greenaio.uninterrupted` no greenlet is parked: what it is for, and what it does."""

import contextlib
import importlib.util
import os
import threading

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError

import greenaio
import greenaio.os
from greenaio._core.uninterrupted import inside, is_uninterrupted
from greenaio._files import position as _position
from greenaio._files import ranges as _ranges
from greenaio._files import turn as _turn
from tests.support import missing
from tests.support.disks import pattern
from tests.support.processes import run_program, run_python

# What is wrong without the context ----------------------------------------------------------------

PATCHED = '''
from tests.programs.patched import *
import gevent, greenaio, os, sys
'''


def run_patched(code, folder):
    run_python(PATCHED + code, folder)


@pytest.mark.parametrize('inside', [True, False])
def test_umask_is_that_of_the_greenlet(folder, inside):
    """Without the context it can't be, or the test shows nothing."""
    context = 'greenaio.uninterrupted()' if inside else 'contextlib.nullcontext()'
    done = run_python(PATCHED + f'''
import contextlib
def secret(k):
    for i in range(30):
        with {context}:
            before = os.umask(0o077)
            with open(f'secret{{k}}-{{i}}', 'w') as file:
                file.write('secret')
            os.umask(before)
def public(k):
    for i in range(30):
        with {context}, open(f'public{{k}}-{{i}}', 'w') as file:
            file.write('public')
at_once(secret, public, secret, public)
print(sorted({{(name[:6], oct(os.stat(name).st_mode & 0o777)) for name in os.listdir()}}))
''', folder)
    wanted = "[('public', '0o644'), ('secret', '0o600')]\n"
    assert (done.stdout == wanted) is inside


def test_working_directory_is_that_of_the_greenlet(folder):
    run_patched('''
top = os.getcwd()
def work(k):
    os.makedirs(f'{top}/{k}', exist_ok=True)
    for i in range(30):
        with greenaio.uninterrupted():
            os.chdir(f'{top}/{k}')
            with open(f'file{k}-{i}', 'w') as file:
                file.write('x')
            os.chdir(top)
at_once(work, work, work)
assert [sorted(os.listdir(str(k))) for k in range(3)] == [
    sorted(f'file{k}-{i}' for i in range(30)) for k in range(3)]
''', folder)


def test_effective_user_is_that_of_the_greenlet(folder):
    if os.geteuid():
        missing('needs root')
    os.chmod(folder, 0o777)
    run_patched('''
def work(k):
    for i in range(30):
        with greenaio.uninterrupted():
            os.seteuid(1000 + k)
            with open(f'file{k}-{i}', 'w') as file:
                file.write('x')
            os.seteuid(0)
        assert os.stat(f'file{k}-{i}').st_uid == 1000 + k
at_once(work, work, work)
''', folder)


def test_native_lock_made_before_the_patch(folder):
    run_patched('''
with open('count', 'w') as file:
    file.write('0')
def work(k):
    for _ in range(20):
        with greenaio.uninterrupted(), early:
            evict('count')
            with open('count') as file:
                value = int(file.read())
            with open('count', 'w') as file:
                file.write(str(value + 1))
at_once(work, work, work)
with open('count') as file:
    assert file.read() == '60'
''', folder)


def test_lock_on_a_file(folder):
    run_patched('''
import fcntl
with open('count', 'w') as file:
    file.write('0')
def work(k):
    for _ in range(20):
        with greenaio.uninterrupted(), open('count', 'r+') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            value = int(file.read())
            file.seek(0)
            file.write(str(value + 1))
            file.flush()
            os.fsync(file.fileno())
at_once(work, work, work)
with open('count') as file:
    assert file.read() == '60'
''', folder)


def test_transaction_of_sqlite(folder):
    run_patched('''
import sqlite3
base = sqlite3.connect('base')
base.execute('create table t (n)')
base.commit()
def work(k):
    mine = sqlite3.connect('base', timeout=1, isolation_level=None)
    for i in range(5):
        with greenaio.uninterrupted():
            mine.execute('begin immediate')
            with open(f'blob{k}-{i}', 'wb') as file:
                file.write(bytes(200_000))
                file.flush()
                os.fsync(file.fileno())
            mine.execute('insert into t values (?)', (i,))
            mine.execute('commit')
    mine.close()
at_once(work, work, work)
assert base.execute('select count(*) from t').fetchone() == (15,)
base.close()
''', folder)


@pytest.mark.parametrize('parse', [
    'len(etree.parse(file).getroot())', 'sum(1 for _ in etree.iterparse(file, tag="x"))'],
    ids=['parse', 'iterparse'])
def test_lxml_reads_file_objects(disk_folder, parse):
    if importlib.util.find_spec('lxml') is None:
        missing('lxml is not installed')
    run_patched(f'''
from lxml import etree
with open('x.xml', 'w') as file:
    file.write('<r>' + ''.join(f'<x n="{{i}}"/>' for i in range(50_000)) + '</r>')
def work(k):
    with greenaio.uninterrupted():
        evict('x.xml')
        with open('x.xml', 'rb') as file:
            return {parse}
assert at_once(work, work, work) == [50_000] * 3
''', disk_folder)


def test_h5py_on_file_objects(disk_folder):
    if importlib.util.find_spec('h5py') is None:
        missing('h5py is not installed')
    run_patched('''
import h5py, numpy
def work(k):
    for i in range(3):
        with greenaio.uninterrupted():
            with open(f'{k}.h5', 'w+b') as file, h5py.File(file, 'w') as written:
                for j in range(5):
                    written.create_dataset(str(j), data=numpy.full(20_000, k + i + j), chunks=(1000,))
                    written.flush()
            evict(f'{k}.h5')
            with open(f'{k}.h5', 'rb') as file, h5py.File(file, 'r') as read:
                assert all((read[str(j)][:] == k + i + j).all() for j in range(5))
at_once(work, work, work)
''', disk_folder)


# What it does ---------------------------------------------------------------------------------------

def test_patched_calls_and_file_objects_do_not_switch(folder):
    run_patched('''
turns = 0
def tick():
    global turns
    while True:
        turns += 1
        gevent.sleep(0)
ticker = gevent.spawn(tick)
gevent.sleep(0)
def use():
    with open('data', 'w+') as file:
        file.write('one\\ntwo\\n' * 10_000)
        file.flush()
        os.fsync(file.fileno())
        evict('data')
        file.seek(0)
        assert len(list(file)) == 20_000
        file.truncate(100)
    with open('data', 'a') as file:
        file.write('x')
    with greenaio.open('data', 'r+b', direct=os.getcwd().startswith('/tmp')) as file:
        file.seek(3)
        file.write(b'y' * 10)
        file.seek(0)
        assert len(file.read()) == 101
    fd = os.open('data', os.O_RDWR)
    os.read(fd, 10), os.write(fd, b'x'), os.pread(fd, 10, 0), os.pwrite(fd, b'x', 0)
    os.readv(fd, [bytearray(1)]), os.writev(fd, [b'x']), os.preadv(fd, [bytearray(1)], 0)
    os.fsync(fd), os.fdatasync(fd), os.ftruncate(fd, 50), os.fstat(fd), os.posix_fallocate(fd, 0, 60)
    os.stat('data'), os.lstat('data')
    os.close(fd)
    r, w = os.pipe()
    with os.fdopen(r, 'rb') as reader, os.fdopen(w, 'wb') as writer:
        writer.write(b'x' * 1000)
        writer.flush()
        assert len(reader.read1(1000)) == 1000
def inside():
    before = turns
    with greenaio.uninterrupted():
        use()
        return turns - before
def outside():
    before = turns
    use()
    return turns - before
assert gevent.spawn(inside).get() == 0
assert gevent.spawn(outside).get() > 5
ticker.kill()
''', folder)


def test_calls_that_are_cooperative_by_name_raise(data_file):
    file = greenaio.File(data_file, os.O_RDWR)
    fd = os.open(data_file, os.O_RDWR)
    r, w = os.pipe()
    os.write(w, b'x')
    calls = [lambda: file.pread(10, 0), lambda: file.pwrite(b'x', 0), file.fsync,
             lambda: greenaio.File(data_file), lambda: greenaio.copyfile(data_file, data_file + '2'),
             lambda: greenaio.os.open(data_file, os.O_RDONLY), lambda: greenaio.os.stat(data_file),
             lambda: greenaio.os.pread(fd, 10, 0), lambda: greenaio.os.read(fd, 10),
             lambda: greenaio.os.write(fd, b'x'), lambda: greenaio.os.fsync(fd),
             lambda: greenaio.os.sendfile(w, fd, 0, 10), lambda: greenaio.os.read(r, 1)]
    for call in calls:
        with greenaio.uninterrupted(), pytest.raises(BlockingSwitchOutError, match='uninterrupted'):
            call()
    with greenaio.uninterrupted():
        greenaio.os.close(fd)
    assert file.pread(8, 0) == pattern(8)
    assert greenaio.os.read(r, 1) == b'x'
    file.close()
    os.close(r)
    os.close(w)


def test_it_is_nested_and_ends_with_an_exception(data_file):
    file, told = greenaio.File(data_file), []

    def can_wait():
        with contextlib.suppress(BlockingSwitchOutError):
            return len(file.pread(8, 0)) == 8
        return False

    with greenaio.uninterrupted():
        with pytest.raises(ZeroDivisionError), greenaio.uninterrupted():
            assert not can_wait()
            raise ZeroDivisionError
        assert not can_wait()
        assert gevent.spawn(can_wait).get()     # another greenlet is not inside
        assert not can_wait()
        thread = threading.Thread(target=lambda: told.append(is_uninterrupted()))
        thread.start()
        thread.join()
        assert told == [False] and is_uninterrupted()
    assert can_wait()
    killed = gevent.spawn(_stay_inside)
    gevent.sleep(0)
    killed.kill()
    assert can_wait() and not inside
    file.close()


def _stay_inside():
    with greenaio.uninterrupted():
        gevent.sleep(10)


def test_a_file_object_that_a_parked_greenlet_uses_raises_at_once():
    r, w = os.pipe()
    file = greenaio.open(r, 'rb')
    reader = gevent.spawn(file.read, 5)
    gevent.sleep(0.01)
    for use in (lambda: file.read(1), lambda: file.peek(1), file.close):
        with greenaio.uninterrupted(), pytest.raises(BlockingSwitchOutError, match='uninterrupted'):
            use()
    os.write(w, b'hello')
    assert reader.get(timeout=5) == b'hello'    # also not disturbed by close
    with greenaio.uninterrupted():
        file.close()
    os.close(w)


def test_a_position_that_a_parked_greenlet_is_moving_raises_at_once(disk_folder):
    run_program('moved_position', disk_folder)


def test_sectors_that_a_parked_greenlet_is_changing_raise_at_once(disk_folder):
    run_program('changed_sectors', disk_folder)


def test_a_turn_of_another_thread_is_waited_for(disk_folder):
    with open(os.path.join(disk_folder, 'data'), 'w+b', buffering=0) as file:
        fd = file.fileno()
        has_it, moved = threading.Event(), []

        def move():
            with _turn.turn_of(fd):
                has_it.set()
                gevent.sleep(0.1)
                moved.append(True)
            gevent.get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=move)
        thread.start()
        has_it.wait()
        with greenaio.uninterrupted():
            assert _position.blocking(os.write, fd, b'x') == 1
        assert moved == [True]
        thread.join()
        assert not _ranges.held()


def test_a_forked_child_is_inside_until_it_leaves(data_file):
    run_program('forked_inside', data_file)
