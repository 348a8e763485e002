"""What a call finds of the process is what it was when the call was made, though a thread makes it later."""

import os
import shutil
import subprocess

import pytest
from test_fallback import WITHOUT
from test_file import SECCOMP

from tests.support import missing
from tests.support.processes import make_plugin_visible, run_program, run_python

PERSONALITY = 135 if os.uname().machine == 'x86_64' else 92     # a system call that nobody misses

# The only thread of a device is busy until `set_free`: it sends a file to a blocking socket that is full.
BUSY_THREAD = '''
import gevent, greenaio, greenaio.os, os, sys
from tests.programs.busy_thread import *
'''
ONE_THREAD = {'GREENAIO_THREADS': '1'}


def test_relative_path_begins_in_the_working_directory_of_the_call(folder):
    run_python(BUSY_THREAD + '''
os.mkdir('here/inner')
before = open_fds()
keep_busy()
calls = [call_in('here', greenaio.os.open, 'by-os', os.O_WRONLY | os.O_CREAT),
         call_in('here/inner', greenaio.os.open, '../by-parent', os.O_WRONLY | os.O_CREAT),
         call_in('here', greenaio.File, 'by-file', os.O_WRONLY | os.O_CREAT),
         call_in('here', greenaio.open, 'by-open', 'w'),
         call_in('here', greenaio.os.open, folder + '/there/absolute', os.O_WRONLY | os.O_CREAT)]
set_free()
gevent.joinall(calls, raise_error=True)
os.close(calls[0].value)
os.close(calls[1].value)
os.close(calls[4].value)
calls[2].value.close()
calls[3].value.close()
assert sorted(os.listdir('here')) == ['by-file', 'by-open', 'by-os', 'by-parent', 'inner'], os.listdir('here')
assert os.listdir('there') == ['absolute']
assert open_fds() == before
''', folder, env=ONE_THREAD)


def test_umask_changed_while_a_thread_creates_a_file_does_not_open_it_to_others(folder):
    run_python('''
        import os, random, sys, time, gevent, gevent.monkey
        gevent.monkey.patch_all(greenaio=True)
        os.chdir(sys.argv[1])
        os.umask(0o077)
        for i in range(3000):
            creating = gevent.spawn(os.open, str(i), os.O_WRONLY | os.O_CREAT, 0o666)
            gevent.sleep(0)
            end = time.perf_counter() + random.uniform(0, 100e-6)
            while time.perf_counter() < end:
                pass
            os.umask(0)
            fd = creating.get()
            os.umask(0o077)
            assert os.fstat(fd).st_mode & 0o777 == 0o600, i
            os.close(fd)
            os.unlink(str(i))
    ''', folder, timeout=120, env=make_plugin_visible(folder))


def test_copy_finds_both_files_in_the_working_directory_of_the_call(folder):
    run_python(BUSY_THREAD + '''
for name in 'here', 'there':
    with open(name + '/from', 'w') as file:
        file.write(name)
os.symlink('from', 'here/link')
before = open_fds()
keep_busy()
copies = [call_in('here', greenaio.copyfile, 'from', 'to'),
          call_in('here', greenaio.copyfile, 'from', folder + '/there/to')]
set_free()
gevent.joinall(copies, raise_error=True)
assert open('here/to').read() == open('there/to').read() == 'here'
os.chdir('here')
greenaio.copyfile('link', 'copy', follow_symlinks=False)
assert os.readlink('copy') == 'from'
os.chdir(folder)
assert open_fds() == before
''', folder, env=ONE_THREAD)


@pytest.mark.parametrize('when', ['queued', 'with a thread'])
def test_killed_while_its_path_is_to_be_looked_up_it_leaves_no_fd(folder, when):
    """Queued, it never happens. A thread that has begun ends the call, in the directory of the call."""
    run_python(BUSY_THREAD + '''
when = sys.argv[2]
before = open_fds()
if when == 'queued':
    keep_busy()
    opening = call_in('here', greenaio.os.open, 'new', os.O_WRONLY | os.O_CREAT)
    opening.kill()
    set_free()
    assert os.listdir('here') == []
else:
    for i in range(50):
        opening = gevent.spawn(greenaio.os.open, f'new{i}', os.O_WRONLY | os.O_CREAT)
        os.chdir('here')
        gevent.sleep(0)
        opening.kill()
        os.chdir(folder)
        if isinstance(opening.value, int):      # the thread was quicker
            os.close(opening.value)
    with gevent.Timeout(10):
        while greenaio.stats().with_threads or open_fds() != before:
            gevent.sleep(0.001)
    assert not [name for name in os.listdir(folder) if name.startswith('new')]
assert open_fds() == before
''', folder, when, env=ONE_THREAD)


def test_number_of_a_directory_is_not_reused_while_an_open_below_it_waits(folder):
    """
        opens a name below the directory fd, and waits
                                        closes the fd; opens another directory: must not get the number
        goes on
    """
    run_python(BUSY_THREAD + '''
keep_busy()
here = os.open('here', os.O_RDONLY | os.O_DIRECTORY)
opening = gevent.spawn(greenaio.os.open, 'new', os.O_WRONLY | os.O_CREAT, dir_fd=here)
gevent.sleep(0.01)
greenaio.os.close(here)
there = os.open('there', os.O_RDONLY | os.O_DIRECTORY)
set_free()
os.close(opening.get())
assert os.listdir('here') == ['new'] and os.listdir('there') == []
os.close(there)
try:
    os.fstat(here)
except OSError:
    pass
else:
    raise AssertionError('still open')
''', folder, env=ONE_THREAD)


def test_relative_path_is_looked_up_also_when_no_fd_is_left(disk_folder):
    run_python('''
        import os, resource, sys, gevent, greenaio.os
        os.chdir(sys.argv[1])
        greenaio.os.stat('/')
        with open('small', 'w'):
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        fds = []
        try:
            while True:
                fds.append(os.dup(0))
        except OSError:
            pass
        assert greenaio.os.stat('small').st_size == 0
        try:
            greenaio.os.open('new', os.O_WRONLY | os.O_CREAT)
        except OSError as error:
            assert error.errno == 24, error
        for fd in fds:
            os.close(fd)
    ''', disk_folder)


def test_without_the_extension_too_it_begins_in_the_working_directory_of_the_call(disk_folder):
    run_python(WITHOUT + '''
import sys
folder = sys.argv[1]
os.chdir(folder)
os.mkdir('here')
greenaio.os.stat('/')
before = os.listdir('/proc/self/fd')
def call(function, *args):
    os.chdir(folder + '/here')
    return function(*args)
for i in range(20):
    opening = gevent.spawn(call, greenaio.os.open, f'new{i}', os.O_WRONLY | os.O_CREAT)
    asking = gevent.spawn(call, greenaio.os.stat, '../here')
    while os.getcwd() == folder:
        gevent.sleep(0)
    os.chdir(folder)
    os.close(opening.get())
    assert asking.get().st_ino == os.stat('here').st_ino
assert os.listdir(folder) == ['here']
assert os.listdir('/proc/self/fd') == before
''', disk_folder)


# The umask ---------------------------------------------------------------------------------------

UMASK = BUSY_THREAD + '''
import greenaio.monkey
os.umask(0o022)
greenaio.monkey.patch_all()

def mode(name):
    return oct(os.stat(name).st_mode & 0o777)

def create(name, mask):
    """A greenlet that creates a file while the umask is *mask*; afterwards it is what it was."""
    def call():
        old = os.umask(mask)
        try:
            with open(name, 'w'):
                pass
        finally:
            os.umask(old)
    greenlet = gevent.spawn(call)
    gevent.sleep(0.01)
    return greenlet
'''


def test_file_gets_no_permission_that_the_umask_of_the_call_forbids(folder):
    run_python(UMASK + '''
keep_busy()
secret = create('secret', 0o077)
assert os.umask(0o022) == 0o077
group = create('group', 0o007)
assert os.umask(0o002) == 0o007
set_free()
gevent.joinall([secret, group], raise_error=True)
assert mode('secret') == '0o600' and mode('group') == '0o660', (mode('secret'), mode('group'))
assert os.umask(0o022) == 0o022
with open('public', 'w'):
    pass
assert mode('public') == '0o644'
''', folder, env=ONE_THREAD)


def test_umask_that_nobody_changes_is_left_to_the_kernel(folder):
    """It knows more: below a directory with a default ACL the umask does not count."""
    if shutil.which('setfacl') is None:
        missing('needs setfacl')
    acl = subprocess.run(['setfacl', '-d', '-m', 'g::rwx,o::rwx', folder], capture_output=True, text=True)
    if acl.returncode:
        pytest.skip(acl.stderr)         # a file system without ACLs
    run_python(UMASK + '''
keep_busy()
creating = gevent.spawn(greenaio.os.open, 'below', os.O_WRONLY | os.O_CREAT, 0o666)
gevent.sleep(0.01)
set_free()
os.close(creating.get())
assert mode('below') == '0o666', mode('below')
''', folder, env=ONE_THREAD)


def test_umask_takes_and_refuses_what_os_umask_does(folder):
    run_python(UMASK + '''
import posix
for mask in (0o27, True, 0o7777, -1, 'x', 1.5, None, 1 << 40):
    found = []
    for umask in posix.umask, os.umask:
        posix.umask(0o022)
        try:
            found.append((umask(mask), posix.umask(0o022)))
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1], (mask, found)
''', folder)


def test_without_the_extension_too_a_file_gets_no_permission_that_the_umask_forbids(disk_folder):
    run_python(WITHOUT + '''
import sys, greenaio.monkey
os.chdir(sys.argv[1])
os.umask(0o022)
greenaio.monkey.patch_all()
def create(name):
    os.umask(0o077)
    with open(name, 'w'):
        pass
for i in range(20):
    creating = gevent.spawn(create, f'secret{i}')
    gevent.sleep(0)
    os.umask(0o022)
    creating.get()
    assert os.stat(f'secret{i}').st_mode & 0o777 == 0o600
''', disk_folder)


# Signals that a call sends to its caller ---------------------------------------------------------

@pytest.mark.parametrize('loop', ['libev-cext', 'libuv-cffi'])
def test_write_beyond_the_limit_of_the_process_sends_its_signal(folder, loop):
    run_program('file_size_limit', folder,
                env={'GEVENT_LOOP': loop, 'PYTHONWARNINGS': 'ignore::DeprecationWarning'})


def test_sendfile_by_a_thread_to_a_peer_that_is_gone_sends_its_signal(folder):
    run_python(BUSY_THREAD + '''
import signal
greenaio.os.close(greenaio.os.open('file', os.O_WRONLY | os.O_CREAT))
with open('file', 'wb') as file:
    file.write(b'x' * 5000)
got = []
signal.signal(signal.SIGPIPE, lambda *args: got.append(1))
one, other = socket.socketpair()
other.close()
fd = os.open('file', os.O_RDONLY)
try:
    greenaio.os.sendfile(one.fileno(), fd, 0, 5000)
except BrokenPipeError:
    pass
else:
    raise AssertionError
assert got == [1]
''', folder)


# Credentials -------------------------------------------------------------------------------------

# Threads of the device are there before the credentials of this one change.
CREDENTIALS = '''
import errno, gevent, greenaio, greenaio.os, os, sys
from tests.programs.credentials import *
'''


def as_root():
    if os.geteuid() != 0:
        missing('needs root')


FILTERS = {'free': '', 'filtered': SECCOMP + f'\ndeny({PERSONALITY}, errno.EPERM)\n'}


@pytest.mark.parametrize('filtered', FILTERS)
def test_thread_opens_a_file_with_the_fsuid_of_the_caller(folder, filtered):
    """As a file server sets it for each client. A seccomp filter may forbid to set it: then it is looked at
    another way."""
    as_root()
    run_python(FILTERS[filtered] + CREDENTIALS + '''
for i in range(3):
    libc.setfsgid(NOBODY)
    libc.setfsuid(NOBODY)
    assert attempts(i) == NONE, attempts(i)
    write(f'mine{i}')
    libc.setfsuid(0)
    libc.setfsgid(0)
    write(f'yours{i}')
    assert owner(f'mine{i}') == (NOBODY, NOBODY), owner(f'mine{i}')
    assert owner(f'yours{i}') == (0, 0), owner(f'yours{i}')
    assert attempts(f'again{i}') == ALL
''', folder)


def test_fsgid_and_two_fsuids_are_told_apart(folder):
    as_root()
    run_python(CREDENTIALS + '''
libc.setfsgid(1234)
write('group')
libc.setfsuid(1000)
write('one')
libc.setfsuid(0)
libc.setfsuid(1001)
write('two')
assert outcome(greenaio.os.open, 'secret', os.O_RDWR) == 'EACCES'
assert [owner(name) for name in ('group', 'one', 'two')] == [(0, 1234), (1000, 1234), (1001, 1234)]
''', folder)


def test_effective_ids_reach_the_threads_whatever_the_fsuid_was(folder):
    """glibc changes them in all threads. That sets each thread's fsuid too, behind the back of the worker."""
    as_root()
    run_python(CREDENTIALS + '''
os.seteuid(1000)
write('one')
os.seteuid(0)
write('root')
libc.setfsuid(1000)
write('two')
os.seteuid(1000)
os.seteuid(0)
libc.setfsuid(1000)
write('three')
assert outcome(greenaio.os.open, 'secret', os.O_RDWR) == 'EACCES'
assert [owner(name)[0] for name in ('one', 'root', 'two', 'three')] == [1000, 0, 1000, 1000]
os.setgroups([])
os.setgid(NOBODY)
os.setuid(NOBODY)
libc.setfsuid(NOBODY)
assert outcome(greenaio.os.open, 'secret', os.O_RDWR) == 'EACCES'
write('four')
assert owner('four') == (NOBODY, NOBODY)
''', folder)


@pytest.mark.parametrize('filtered', FILTERS)
def test_capabilities_that_the_caller_gave_up_the_thread_does_not_use(folder, filtered):
    as_root()
    run_python(FILTERS[filtered] + CREDENTIALS + '''
os.chown('secret', 1, 1)
os.chown('closed', 1, 1)

def effective(*change):
    """What this thread's effective capabilities were; *change* them."""
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(head, data) == 0
    before = data[0], data[3]
    if change:
        data[0], data[3] = change
        assert libc.capset(head, data) == 0
    return before

for i in range(3):
    low, high = effective()
    effective(low & ~0b1110, high)                  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert attempts(i) == NONE, attempts(i)
    effective(0, 0)
    assert attempts(i) == NONE, attempts(i)
    effective(low, high)
    assert attempts(f'again{i}') == ALL, attempts(f'again{i}')
''', folder)


def test_close_that_a_thread_may_not_do_as_the_caller_is_done(folder):
    """A close needs no permission; an fd that stays open for ever would be worse."""
    as_root()
    run_python(CREDENTIALS + '''
fd = greenaio.os.open('mine', os.O_WRONLY | os.O_CREAT)
libc.setfsuid(NOBODY)
greenaio.os.close(fd)
try:
    os.fstat(fd)
except OSError:
    pass
else:
    raise AssertionError('still open')
''', folder)

# What a thread is born with ----------------------------------------------------------------------

BORN = CREDENTIALS + '''
def forbid_writing():
    """A Landlock domain, of this thread and those that it starts, without any write to a file."""
    rules = (ctypes.c_uint64 * 1)(0x2 | 0x100)      # WRITE_FILE, MAKE_REG
    fd = libc.syscall(444, rules, 8, 0)             # landlock_create_ruleset
    if fd < 0:
        print('no landlock')
        sys.exit()
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.syscall(446, fd, 0) == 0            # landlock_restrict_self
    os.close(fd)

def tasks():
    return len(os.listdir('/proc/self/task'))

def wait_for(condition):
    with gevent.Timeout(10):
        while not condition():
            gevent.sleep(0.001)
'''


def born(code, folder, **kwargs):
    as_root()
    if run_python(BORN + code, folder, **kwargs).stdout == 'no landlock\n':
        missing('needs Landlock')


def test_after_renewal_threads_may_do_what_the_caller_may(folder):
    born('''
old = set(os.listdir('/proc/self/task')) - {str(os.getpid())}
assert old
forbid_writing()
greenaio.renew_threads()
assert outcome(greenaio.os.open, 'new', os.O_WRONLY | os.O_CREAT) == 'EACCES'
assert outcome(greenaio.os.open, 'warm0', os.O_WRONLY) == 'EACCES'
assert outcome(greenaio.os.open, 'warm0', os.O_RDONLY) == 'done'
wait_for(lambda: not old.intersection(os.listdir('/proc/self/task')))
assert not os.path.exists('new')
''', folder)


def test_after_renewal_a_thread_that_was_born_free_does_nothing_for_one_that_is_not(folder):
    """
        main thread                      thread with a hub
        shares its threads
                                         forbids itself to write; renews
        writes: a thread of its own
                                         writes: not by that thread
    """
    born('''
import threading
found = []
def work():
    gevent.get_hub()
    forbid_writing()
    greenaio.renew_threads()
    turn.set()
    mine.wait()
    found.append(outcome(greenaio.os.open, 'new', os.O_WRONLY | os.O_CREAT))
    other = threading.Thread(target=inherit)
    other.start()
    other.join()
    gevent.get_hub().destroy()
def inherit():
    found.append(outcome(greenaio.os.open, 'newer', os.O_WRONLY | os.O_CREAT))
    gevent.get_hub().destroy()
turn, mine = threading.Event(), threading.Event()
thread = threading.Thread(target=work)
thread.start()
turn.wait()
for i in range(3):
    write(f'mine{i}')
at_most = tasks()
mine.set()
thread.join()
write('again')
assert found == ['EACCES', 'EACCES'], found
wait_for(lambda: tasks() < at_most)                 # with its hub, a thread's own threads end
''', folder)


def test_renewed_often_it_keeps_no_thread_and_no_memory_of_the_old_ones(folder):
    born('''
from greenaio._core import pools as _pools
def rounds(n):
    for i in range(n):
        greenaio.renew_threads()
        gevent.joinall([gevent.spawn(write, f'new{k}') for k in range(4)], raise_error=True)
    greenaio.renew_threads()
    write('last')
    wait_for(lambda: tasks() == 2)
rounds(5)
assert len(_pools.pools()) == 1
fds = len(os.listdir('/proc/self/fd'))
rounds(50)
assert len(_pools.pools()) == 1 and len(os.listdir('/proc/self/fd')) == fds
pid = os.fork()
if pid == 0:
    write('child')
    greenaio.renew_threads()
    write('child')
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
write('parent')
''', folder, env={'PYTHONWARNINGS': 'ignore::DeprecationWarning'})


def test_renewal_loses_no_call_that_was_asked_for_before(folder):
    run_python(BUSY_THREAD + '''
keep_busy()
calls = [gevent.spawn(greenaio.os.open, f'here/{i}', os.O_WRONLY | os.O_CREAT) for i in range(10)]
killed = gevent.spawn(greenaio.os.open, 'here/killed', os.O_WRONLY | os.O_CREAT)
gevent.sleep(0.01)
greenaio.renew_threads()
os.close(greenaio.os.open('there/new', os.O_WRONLY | os.O_CREAT))     # the old thread hangs
assert os.listdir('here') == []
killed.kill()
set_free()
gevent.joinall(calls, raise_error=True)
for call in calls:
    os.close(call.value)
assert sorted(os.listdir('here')) == sorted(map(str, range(10)))
with gevent.Timeout(10):
    while len(os.listdir('/proc/self/task')) > 2:
        gevent.sleep(0.001)
''', folder, env=ONE_THREAD)


def test_after_renewal_threads_see_the_mounts_of_the_caller(disk_folder):
    born('''
os.mkdir('A')
os.mkdir('B')
assert libc.unshare(0x20000) == 0                   # CLONE_NEWNS
assert libc.mount(b'none', b'/', None, 0x44000, None) == 0
assert libc.mount(b'A', b'B', None, 0x1000, None) == 0
greenaio.renew_threads()
write('B/new')
assert os.listdir('A') == ['new'], os.listdir('A')
assert libc.umount2(b'B', 2) == 0
assert os.listdir('B') == []
''', disk_folder)


def test_without_the_extension_too_threads_are_renewed(disk_folder):
    run_python(WITHOUT + '''
import sys
os.chdir(sys.argv[1])
greenaio.os.stat('.')
pool = gevent.get_hub()._greenaio_pool
greenaio.renew_threads()
assert greenaio.os.stat('.') == os.stat('.')
assert gevent.get_hub()._greenaio_pool is not pool
''', disk_folder)


def test_files_of_this_thread_in_proc_are_those_of_the_caller():
    run_python('''
        import os, threading, gevent, greenaio.os
        def work():
            tid = threading.get_native_id()
            with greenaio.open('/proc/thread-self/stat') as file:
                found.append(file.read().split()[0] == str(tid))
            fd = greenaio.os.open('/proc/thread-self/comm', os.O_RDONLY)
            with open(f'/proc/self/task/{tid}/comm', 'rb') as comm:
                found.append(os.read(fd, 100) == comm.read())
            mine = os.stat(f'/proc/self/task/{tid}')
            found.append(greenaio.os.stat('/proc/thread-self').st_ino == mine.st_ino)
            gevent.get_hub().destroy()
        found = []
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        work()
        assert found == [True] * 6, found
    ''')


# What audit hooks see ----------------------------------------------------------------------------

AUDIT = '''
import gevent, os, pathlib, sys
from tests.programs.audit import *
'''


def test_audit_hooks_see_what_os_and_io_tell_them(folder):
    run_python(AUDIT + '''
with real[2]('file', 'w') as file:
    file.write('text')
fd = os.open('file', os.O_RDWR)
def opener(name, flags):
    return os.open(name, flags)
path = pathlib.Path('file')
for i, args in [(0, ('file', os.O_RDONLY)), (0, (b'file', os.O_RDWR)), (0, (path, os.O_WRONLY)),
                (0, ('missing', os.O_RDONLY)), (0, ('new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
                (1, (fd, 3)), (1, (fd, 5)), (2, ('file',)), (2, ('file', 'rb')), (2, ('file', 'wb')),
                (2, ('file', 'b+r')), (2, ('file', 'a+')), (2, (b'file', 'rt')), (2, (path, 'w')),
                (2, ('missing', 'rb')), (2, ('file', 'rb', -1, None, None, None, True, opener)),
                (3, ('file', 'br+')), (3, ('file', 'r')), (5, ('file',)), (6, (fd,))]:
    for _ in range(2):
        assert events(ours[i], *args) == events(real[i], *args), (i, args, events(ours[i], *args))
with open('file', 'r+b') as file, real[2]('file', 'r+b') as plain:
    assert events(file.truncate, 2) == events(plain.truncate, 2) == []
assert [one[0] for one in events(ours[4], 'file', 'copy')] == ['shutil.copyfile', 'open', 'open']

told = []
def callback():         # in the hub it is the plain call
    told.append(events(ours[2], 'file', 'rb'))
gevent.get_hub().loop.run_callback(callback)
gevent.sleep(0.01)
assert [one[:-1] for one in told[0]] == [one[:-1] for one in events(real[2], 'file', 'rb')]
os.close(fd)
''', folder)


def test_audit_hook_that_forbids_an_open_is_obeyed(folder):
    run_python(AUDIT + '''
def forbid(event, args):
    if event == 'open' and args[0] == 'file' and args[1] == 'w':
        raise PermissionError('not that')
with open('file', 'wb') as file:
    file.write(b'kept')
sys.addaudithook(forbid)
try:
    open('file', 'w')
except PermissionError:
    pass
else:
    raise AssertionError
assert pathlib.Path('file').read_bytes() == b'kept'
''', folder)
