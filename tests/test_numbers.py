"""The number of a file: one way to close it, and after a fork it is the child's own.

Each `known_fault` is one of today's code. The rebuilt handle has to make these tests pass.
"""

import os

import pytest

from tests.support import missing
from tests.support.disks import FreezableDisk
from tests.support.processes import run_program, run_python


@pytest.fixture
def frozen_ext4(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    disk = FreezableDisk(str(tmp_path), 'ext4', '64M')
    yield disk
    disk.close()


CLOSED_TWICE = '''
import gevent, greenaio.os, os, subprocess
from tests.programs.closed_twice import *
'''


def test_number_that_is_being_closed_is_closed_for_new_calls(frozen_ext4):
    done = run_python(CLOSED_TWICE + '''
first = gevent.spawn(outcome, greenaio.os.close, victim)
gevent.sleep(0.05)
print(outcome(greenaio.os.fstat, victim), outcome(greenaio.os.pread, victim, 1, 0))
first.join()
print(outcome(greenaio.os.close, victim))
subprocess.run(thaw, shell=True, check=True)
reader.join()
''', frozen_ext4.path, *frozen_ext4.commands(), env={'GREENAIO_THREADS': '1'})
    assert done.stdout.split() == ['EBADF', 'EBADF', 'EBADF']


def test_close_that_is_tried_again_closes_no_other_file(frozen_ext4):
    done = run_python(CLOSED_TWICE + '''
outcome(greenaio.os.close, victim)
between = [gevent.spawn(greenaio.os.pread, large, 1 << 20, i << 20) for i in range(16)]
gevent.sleep(0)
outcome(greenaio.os.close, victim)
subprocess.run(thaw, shell=True, check=True)
others = []
while not all(job.ready() for job in between):
    others.append(os.open(os.devnull, os.O_RDONLY))
    gevent.sleep(0)
print(len(others) - len(set(others)))       # a number that was given out twice was closed by greenaio
''', frozen_ext4.path, *frozen_ext4.commands(), env={'GREENAIO_THREADS': '1'})
    assert done.stdout.split() == ['0']


def test_number_that_is_no_longer_greenaios_own_is_left_alone():
    """A daemon closes all numbers, and opens its files on them."""
    run_python('''
import os, sys, tempfile
import gevent, greenaio, greenaio.os
greenaio.os.stat('.')
os.closerange(3, 256)
files = [tempfile.TemporaryFile() for _ in range(32)]
before = [os.fstat(file.fileno()).st_ino for file in files]
pid = os.fork()
if pid == 0:
    numbers = [file.fileno() for file in files]
    kept = [os.path.exists(f'/proc/self/fd/{fd}') and os.fstat(fd).st_ino for fd in numbers]
    os._exit(kept != before)
assert os.waitpid(pid, 0)[1] == 0, 'a file of the program was closed in the child'
''')


def test_numbers_that_a_daemon_has_closed_are_left_to_its_own_files():
    """A hub that goes on, ends, or forks after that takes none of them for its eventfd."""
    run_program('daemon_files')


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_child_of_a_daemon_that_has_closed_the_numbers_of_its_loop(disk_folder, loop):
    """libuv takes no watcher before `gevent.reinit` has given the loop new numbers."""
    run_program('daemon_loop', disk_folder, env={'GEVENT_LOOP': loop})


def test_child_that_has_closed_the_numbers_of_an_open_that_its_parent_waits_for(folder):
    run_program('daemon_paths', folder)


# Forks -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('user', ['greenlet', 'thread'])
def test_child_closes_a_number_that_the_parent_was_using(user):
    run_program('number_in_use', user)


def test_child_has_another_file_behind_a_number_whose_sectors_the_parent_writes(disk_folder):
    run_program('number_of_sectors_in_use', disk_folder)


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
@pytest.mark.parametrize('give', ['os.dup2(ours, reading)',
                                  'os.closerange(reading, reading + 1); os.dup2(ours, reading)'])
def test_child_gives_a_number_that_the_parent_was_using_to_a_file_of_its_own(give, loop):
    run_python('''
import errno, gevent, greenaio.os, os
reading, writing = os.pipe()

def use():
    try:
        return greenaio.os.read(reading, 99)
    except OSError as error:
        return error.errno

user = gevent.spawn(use)
gevent.sleep(0.05)
pid = os.fork()
if pid == 0:
    ours, into = os.pipe()
    ''' + give + '''
    gevent.reinit()
    os.write(into, b'of the child')
    user.join(10)
    os._exit(user.value != errno.EBADF or os.read(ours, 99) != b'of the child')
assert os.waitpid(pid, 0)[1] == 0, 'the copy read what was not for it'
os.write(writing, b'x')
assert user.get() == b'x'
''', env={'GEVENT_LOOP': loop})


@pytest.mark.parametrize('limit', [64, 1024])       # the eventfd has one number, or two
def test_child_for_which_no_number_is_free_shares_no_wake_up_with_its_parent(limit):
    run_python('''
import gevent, greenaio.os, os, resource, select, sys
from greenaio._core import hub as _hub
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
greenaio.os.stat('.')
context = _hub.get_driver().engine.context
context.clear()

def signalled():
    numbers = {context.eventfd, context.own_eventfd}
    return len(numbers) == len(select.select(numbers, [], [], 0)[0])

files = []
try:
    while True:
        files.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
pid = os.fork()
if pid == 0:
    os._exit(not signalled())       # by the handler
status = os.waitpid(pid, 0)[1]
assert status == 0 and not signalled(), status
''', limit)


FORKED_BY_C = '''
import gevent, greenaio, greenaio.os, os, sys, threading, time
from tests.programs.forked_by_c import *
'''


def test_file_that_a_thread_used_can_be_used_or_refuses_in_a_child_forked_by_c():
    run_python(FORKED_BY_C + '''
reading, writing = os.pipe()
file = greenaio.open(reading, 'rb')

def use():
    gevent.get_hub()
    file.read(1)

threading.Thread(target=use, daemon=True).start()
time.sleep(0.2)
greenaio.open(os.devnull, 'rb').close()     # what is done once for each hub rings the bell, too
pid = libc.fork()
if pid == 0:
    try:
        file.read(1)
    except OSError:
        pass
    os._exit(0)
status = finish(pid)
os.write(writing, b'xx')
assert status == 0, status
''')


def test_sectors_that_a_thread_was_writing_can_be_written_in_a_child_forked_by_c(frozen_ext4):
    """The child writes the sector on which a thread of the parent waits for the disk."""
    done = run_program('sectors_in_use', frozen_ext4.path, *frozen_ext4.commands())
    assert done.stdout.split() == ['0']


def test_number_that_a_job_was_using_can_be_closed_in_a_child_forked_by_c():
    run_python(FORKED_BY_C + '''
reading, writing = os.pipe()
name = f'/proc/self/fd/{reading}'
pipe = os.readlink(name)
gevent.spawn(greenaio.os.read, reading, 1)
gevent.sleep(0.05)
pid = libc.fork()
if pid == 0:
    greenaio.os.close(reading)
    os._exit(os.path.realpath(name).endswith(pipe))     # a thread may open another, and close it
status = finish(pid)
os.write(writing, b'x')
gevent.sleep(0.05)
assert status == 0, status
''')
