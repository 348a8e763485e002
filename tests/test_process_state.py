"""What a call finds of the process is what it was when the call was made, though a thread makes it later."""

import pytest
from conftest import run_python
from test_fallback import WITHOUT

# The only thread of a device is busy until `set_free`: it sends a file to a blocking socket that is full.
BUSY_THREAD = '''
import os, socket, sys, gevent, greenaio, greenaio.os
folder = sys.argv[1]
os.chdir(folder)
os.mkdir('here')
os.mkdir('there')
greenaio.os.stat(folder)            # the hub has its fds

def open_fds():
    return sorted(os.listdir('/proc/self/fd'))

def keep_busy():
    global sending, receiver, sender, big
    with open(folder + '/big', 'wb') as file:
        file.write(bytes(1 << 20))
    big = os.open(folder + '/big', os.O_RDONLY)
    sender, receiver = socket.socketpair()
    sending = gevent.spawn(greenaio.os.sendfile, sender.fileno(), big, 0, 1 << 20)
    gevent.sleep(0.05)

def set_free():
    receiver.setblocking(False)
    while not sending.ready():
        try:
            receiver.recv(1 << 20)
        except BlockingIOError:
            gevent.sleep(0.001)
    receiver.close()
    sender.close()
    os.close(big)

def call_in(directory, function, *args, **kwargs):
    """A greenlet that makes the call while *directory* is the working directory, and another afterwards."""
    def call():
        os.chdir(directory)
        return function(*args, **kwargs)
    greenlet = gevent.spawn(call)
    gevent.sleep(0.01)
    assert not greenlet.ready()
    os.chdir(folder)
    return greenlet
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
