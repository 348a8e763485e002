"""A native thread shares the processor of the hub for a short call, and nothing else is bound to it."""

import os

import pytest
from test_file import SECCOMP

from tests.support import missing
from tests.support.processes import run_python

START = '''
import errno, os, signal, subprocess, sys, threading
import gevent, greenaio.os
from greenaio import File
from greenaio._core import pools as _pools
folder = sys.argv[1]
EVERY = os.sched_getaffinity(0)
path = folder + '/file'

def create():
    """A short call by a thread, on ext4 as in memory."""
    os.close(greenaio.os.open(path, os.O_RDWR | os.O_CREAT))

def copy():
    """A call for which a thread needs all processors. The file stays open: to close it is a short call."""
    opened.append(File(path, os.O_RDWR | os.O_CREAT))
    opened[-1].pwrite(bytes(1 << 20), 0)
    opened[-1].pread(1 << 20, 0)
opened = []

def workers():
    """The processors of each native thread."""
    mine = {str(thread.native_id) for thread in threading.enumerate()}
    return [os.sched_getaffinity(int(task)) for task in os.listdir('/proc/self/task') if task not in mine]

def bound():
    return [cpus for cpus in workers() if len(cpus) == 1]

def never():
    return False

def burst(until=never, calls=300):
    for i in range(calls if until is never else 20000):
        create()
        if until():
            return True
    return False
'''
ONE = {'GREENAIO_THREADS': '1'}


def run(code, folder, env=None):
    if len(os.sched_getaffinity(0)) < 2:
        missing('needs two processors')
    run_python(START + code, folder, env=env)


def test_one_thread_makes_call_after_call(folder):
    run('''
burst()
assert [pool.threads for pool in _pools.pools()] == [1]
''', folder)


def test_thread_is_bound_for_short_calls_and_all_that_is_started_in_between_is_not(tmp_path):
    run('''
seen, heard = [], []
def look():
    while not seen or len(heard) < 3:
        thread = threading.Thread(target=lambda: heard.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        seen.append(subprocess.run(
            [sys.executable, '-c', 'import os; print(len(os.sched_getaffinity(0)))'],
            stdout=subprocess.PIPE, text=True).stdout)
assert burst(bound)
looking = gevent.spawn(look)
while not looking.ready():
    burst(calls=20)
    assert os.sched_getaffinity(0) == EVERY
    gevent.sleep(0)
looking.get()
assert set(seen) == {f'{len(EVERY)}\\n'}, seen
assert all(cpus == EVERY for cpus in heard), heard
assert len(bound()) <= 1
''', tmp_path)


def test_bound_thread_has_all_processors_for_a_long_call(folder):
    run('''
assert burst(bound)
copy()
assert workers() == [EVERY], workers()
assert burst(bound)
''', folder, ONE)


def test_long_call_beside_short_ones_takes_another_thread(tmp_path):
    run('''
assert burst(bound)
copy()
assert len(bound()) == 1 and EVERY in workers(), workers()
''', tmp_path)


def test_short_calls_that_wait_for_the_disk_are_long(disk_folder):
    run('''
with File(path, os.O_RDWR | os.O_CREAT | os.O_DSYNC) as file:
    for i in range(40):
        file.pwrite(b'waits for the disk', 0)
    assert EVERY in workers(), workers()
''', disk_folder)


def test_one_of_many_short_calls_at_once_is_bound(tmp_path):
    run('''
def work(i):
    for _ in range(20):
        os.close(greenaio.os.open(f'{path}{i}', os.O_RDWR | os.O_CREAT))
gevent.joinall([gevent.spawn(work, i) for i in range(16)], raise_error=True)
assert len(workers()) > 1 and len(bound()) <= 1, workers()
''', tmp_path)


@pytest.mark.parametrize('which', ['the same processor', 'the others'])
def test_processors_that_the_user_changes_stay_as_they_are(tmp_path, which):
    run(f'''
assert burst(bound)
cpus = {{next(iter(bound()[0]))}}
if {which!r} == 'the others':
    cpus = EVERY - cpus
for task in os.listdir('/proc/self/task'):
    os.sched_setaffinity(int(task), cpus)
copy()
assert all(seen == cpus for seen in workers()), (cpus, workers())
burst()
assert all(seen <= cpus for seen in workers()), (cpus, workers())
''', tmp_path, ONE)


def test_processors_that_the_user_took_from_a_thread_are_not_given_back(tmp_path):
    if len(os.sched_getaffinity(0)) < 3:
        pytest.skip('needs three processors')
    run('''
create()
some = set(sorted(EVERY)[:2])
for task in os.listdir('/proc/self/task'):
    os.sched_setaffinity(int(task), some)
assert burst(bound)
copy()
assert workers() == [some], workers()
''', tmp_path, ONE)


def test_set_of_processors_that_shrinks_and_grows_reaches_all_threads(tmp_path):
    root = '/sys/fs/cgroup/cpuset'
    if os.geteuid() != 0 or not os.path.exists(f'{root}/cgroup.procs'):
        missing('needs root and the cpuset controller of cgroup v1')
    group = f'{root}/greenaio-{os.getpid()}'
    os.mkdir(group)
    try:
        run(f'''
group = {group!r}
def give(name, value):
    with open(f'{{group}}/{{name}}', 'w') as file:
        file.write(value)
give('cpuset.mems', '0')
give('cpuset.cpus', ','.join(map(str, EVERY)))
give('cgroup.procs', str(os.getpid()))
assert burst(bound)
for cpu in sorted(EVERY):
    give('cpuset.cpus', str(cpu))
    burst()
    copy()
    assert workers() == [{{cpu}}], workers()
give('cpuset.cpus', ','.join(map(str, EVERY)))
assert burst(bound)
copy()
assert workers() == [EVERY], workers()
group = {root!r}
give('cgroup.procs', str(os.getpid()))
''', tmp_path, ONE)
    finally:
        os.rmdir(group)


@pytest.mark.parametrize('before', ['create()', 'assert burst(bound)'], ids=['from the start', 'later'])
def test_hub_in_real_time_shares_its_processor_with_no_thread(tmp_path, before):
    if os.geteuid() != 0:
        missing('needs root')
    run(before + '''
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
burst()
assert not bound()
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
assert burst(bound)
''', tmp_path, ONE)


def test_bound_thread_has_all_processors_for_a_long_call_of_a_hub_that_may_not_give_it_these(tmp_path):
    """The thread of the hub alone has other ids: the C library gives them to all."""
    if os.geteuid() != 0:
        missing('needs root')
    run(f'''
import ctypes
file = File(path, os.O_RDWR | os.O_CREAT)
assert burst(bound)
assert ctypes.CDLL(None).syscall({SETRESUID}, -1, 65534, -1) == 0
file.pwrite(bytes(1 << 20), 0)
assert workers() == [EVERY], workers()
''', tmp_path, ONE)


KILL = SECCOMP.replace('0x00050000 | code', '0x80000000') + '\n'
SETAFFINITY = 203 if os.uname().machine == 'x86_64' else 122
SETRESUID = 117 if os.uname().machine == 'x86_64' else 147
PERSONALITY = 135 if os.uname().machine == 'x86_64' else 92
DEADLY = KILL + f'deny({SETAFFINITY}, 0)\n'
HARMLESS = SECCOMP + f'deny({PERSONALITY}, errno.EPERM)\n'


@pytest.mark.parametrize('code', ['EPERM', 'ENOSYS'])
def test_refused_binding_is_none(tmp_path, code):
    if len(os.sched_getaffinity(0)) < 2:
        missing('needs two processors')
    run_python(SECCOMP + f'deny({SETAFFINITY}, errno.{code})\n' + START + '''
burst()
copy()
assert all(cpus == EVERY for cpus in workers()), workers()
''', tmp_path)


def test_filter_that_allows_binding_is_found_out(tmp_path):
    run_python(HARMLESS + START + 'assert burst(bound)\n', tmp_path)


@pytest.mark.parametrize('before, later', [('', ''), (HARMLESS, ''), ('', DEADLY)],
                         ids=['no filter', 'one that allows it', 'one that the hub alone is under'])
def test_bound_thread_has_all_processors_for_a_long_call_that_waited_for_it(disk_folder, before, later):
    if len(os.sched_getaffinity(0)) < 2:
        missing('needs two processors')
    run_python(before + START + '''
files = File(path, os.O_RDWR | os.O_CREAT | os.O_DSYNC), File(path + '2', os.O_RDWR | os.O_CREAT)
assert burst(bound)
''' + later + '''
gevent.joinall([gevent.spawn(files[0].pwrite, b'waits for the disk', 0),
                gevent.spawn(files[1].pwrite, bytes(1 << 20), 0)], raise_error=True)
assert workers() == [EVERY], workers()
''', disk_folder, env=ONE)


@pytest.mark.parametrize('before, later', [
    (DEADLY, ''), ('', DEADLY), (HARMLESS, DEADLY), ('', 'assert burst(bound)\n' + DEADLY)],
    ids=['before the import', 'later', 'beside one that allows it', 'while one is bound'])
def test_filter_that_kills_a_process_that_binds_a_thread_kills_none(tmp_path, before, later):
    run_python(before + START + later + '''
burst()
copy()
burst()
''', tmp_path, env=ONE)


def test_child_that_tries_the_filters_leaves_no_trace(tmp_path):
    run_python(DEADLY + '''
import resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
os.chdir(sys.argv[1])
signal.signal(signal.SIGCHLD, lambda *_: children.append(1))
children = []
import greenaio.os
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    children.append(None)
assert children == [None] and os.listdir('.') == []
''', tmp_path)
