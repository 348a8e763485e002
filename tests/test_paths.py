"""Opens that wait for no disk, paths over several devices, and where each of them waits."""

import contextlib
import errno
import fcntl
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import gevent
import pytest
from test_file import SECCOMP

import greenaio
import greenaio.os
from greenaio import File, config
from greenaio._core import hub as _hub
from greenaio._core import pools as _pools
from tests.support import missing
from tests.support.disks import is_mounted
from tests.support.processes import run, run_program, run_python
from tests.support.scanners import FAN_ACCESS_PERM, FAN_OPEN_PERM, scanned

OPENAT2, STATMOUNT = 437, 457
LONE_KEPT = 4


def threads():
    """How many threads there are that are no disk's."""
    return sum(pool.threads for pool in _pools.pools() if pool.device is None)


def open_fds():
    return len(os.listdir('/proc/self/fd'))


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        gevent.sleep(0.005)
    assert true()


@pytest.fixture
def fifo(folder):
    path = os.path.join(folder, 'fifo')
    os.mkfifo(path)
    return path


# Without a peer ----------------------------------------------------------------------------------

@pytest.mark.parametrize('flags', [os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC])
def test_open_of_a_fifo_without_a_peer_holds_up_no_other_file_and_gives_its_thread_back(folder, fifo, flags):
    def create():
        with File(os.path.join(folder, 'other'), os.O_WRONLY | os.O_CREAT) as file:
            file.pwrite(b'x', 0)

    create()
    fds = open_fds()
    waiting = [gevent.spawn(greenaio.os.open, fifo, flags) for _ in range(3 * config.threads)]
    gevent.sleep(0.05)
    assert threads() >= len(waiting)
    with gevent.Timeout(10):
        create()
    assert not any(greenlet.ready() for greenlet in waiting)
    gevent.killall(waiting)
    wait_until(lambda: threads() <= LONE_KEPT and open_fds() <= fds)
    with pytest.raises(OSError) as caught:      # nobody has it open any more
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO


def test_open_of_a_fifo_that_times_out_again_and_again_piles_up_nothing(fifo):
    other = gevent.spawn(greenaio.os.open, fifo, os.O_RDONLY)
    for _ in range(20):
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
            greenaio.open(fifo)
    gevent.sleep(0.05)
    assert not other.ready()            # what ended the opens was no peer for this one
    other.kill()
    wait_until(lambda: threads() <= LONE_KEPT and not _hub.get_driver().engine.lent)


def test_open_of_a_fifo_that_is_killed_before_a_thread_has_it_opens_nothing(fifo):
    """
        greenlet           hub                  thread
        asks for a thread
                           kills the greenlet
                                                begins, or not
    """
    fds = open_fds()
    for _ in range(50):
        greenlet = gevent.spawn(greenaio.os.open, fifo, os.O_RDONLY)
        gevent.sleep(0)
        greenlet.kill()
        assert isinstance(greenlet.value, gevent.GreenletExit)
    wait_until(lambda: open_fds() <= fds)
    with pytest.raises(OSError) as caught:
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO


def test_both_ends_of_a_fifo_find_each_other(fifo):
    with gevent.Timeout(10):
        reading = gevent.spawn(greenaio.os.open, fifo, os.O_RDONLY)
        gevent.sleep(0.02)
        writer = greenaio.os.open(fifo, os.O_WRONLY)
        reader = reading.get()
        os.write(writer, b'through')
        os.close(writer)
        assert os.read(reader, 100) == b'through'
        assert os.read(reader, 100) == b''
    assert fcntl.fcntl(reader, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) == os.O_RDONLY
    os.close(reader)


def test_open_of_a_fifo_that_need_not_wait_is_as_os_opens_it(fifo):
    reader = greenaio.os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(reader)
    with pytest.raises(OSError) as caught:
        greenaio.os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO
    os.close(greenaio.os.open(fifo, os.O_RDWR))
    os.close(greenaio.os.open(fifo, os.O_PATH))


def test_what_only_looks_at_a_fifo_does_not_wait_for_it(folder, fifo):
    os.symlink('fifo', os.path.join(folder, 'link'))
    for path in (fifo, os.path.join(folder, 'link')):
        with gevent.Timeout(10):
            assert greenaio.os.stat(path) == os.stat(path)
            assert greenaio.os.stat(path, follow_symlinks=False) == os.lstat(path)


def test_writer_killed_beside_a_process_that_waits_to_write_does_not_end_it(fifo):
    """The other writer gets a reader, for as long as it takes our open to return: no SIGPIPE then."""
    opens = 'import os, sys; os.open(sys.argv[1], os.O_WRONLY)'
    other = subprocess.Popen([sys.executable, '-c', opens, fifo])
    writing = gevent.spawn(greenaio.os.open, fifo, os.O_WRONLY)
    gevent.sleep(0.5)
    writing.kill()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert other.wait(10) == 0
    os.close(reader)


@pytest.mark.parametrize('path', ['/dev/null', '/dev/zero', '/dev/ptmx', '/dev/urandom'])
def test_character_device_is_opened_by_no_thread_of_a_disk(path):
    greenaio.os.stat('/dev')
    pool = {pool.device: pool.threads for pool in _pools.pools() if pool.device is not None}
    os.close(greenaio.os.open(path, os.O_RDWR))
    assert pool == {pool.device: pool.threads for pool in _pools.pools() if pool.device is not None}


def test_what_can_not_be_opened_says_so_as_in_os(folder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(folder, 'socket'))
    for name, flags in (('socket', os.O_RDONLY), ('', os.O_WRONLY), ('socket/', os.O_RDONLY),
                        ('no/such', os.O_RDWR | os.O_CREAT), ('socket/x', os.O_RDWR | os.O_CREAT),
                        ('socket', os.O_RDWR | os.O_CREAT | os.O_EXCL), ('socket', os.O_DIRECTORY)):
        with pytest.raises(OSError) as wanted:
            os.open(os.path.join(folder, name), flags)
        with pytest.raises(type(wanted.value)) as caught:
            greenaio.os.open(os.path.join(folder, name), flags)
        assert (caught.value.errno, caught.value.filename) == (wanted.value.errno, wanted.value.filename)


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
@pytest.mark.parametrize('end', ['fork', 'destroy', 'exit', 'raise'])
def test_open_of_a_fifo_that_waits_ends_with_its_hub(disk_folder, loop, end):
    fifo = os.path.join(disk_folder, 'fifo')
    os.mkfifo(fifo)
    done = run_program('hub_of_fifo_ends', fifo, end, env={'GEVENT_LOOP': loop}, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (7 if end == 'raise' else 0, '')


# Leases ------------------------------------------------------------------------------------------

LEASE = '''
import fcntl, os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
for path in sys.argv[2:]:
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print(flush=True)
if sys.argv[1] == 'give up':
    signal.sigwait([signal.SIGIO])
    time.sleep(0.2)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
sys.stdin.read()
'''


@contextlib.contextmanager
def leased(how, *paths):
    with subprocess.Popen([sys.executable, '-c', LEASE, how, *paths], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield
        holder.stdin.close()


def test_open_of_a_leased_file_holds_up_no_other_file_and_can_be_killed(folder):
    paths = [os.path.join(folder, str(i)) for i in range(config.threads + 5)]
    for path in paths:
        with open(path, 'w'):
            pass
    before = threads()
    with leased('keep', *paths):
        ways = (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        waiting = [gevent.spawn(greenaio.os.open, path, ways[i % 3]) for i, path in enumerate(paths)]
        gevent.sleep(0.1)
        with gevent.Timeout(10), File(os.path.join(folder, 'other'), os.O_WRONLY | os.O_CREAT) as file:
            file.pwrite(b'x', 0)
        assert not any(greenlet.ready() for greenlet in waiting)
        gevent.killall(waiting)
        wait_until(lambda: not _hub.get_driver().engine.lent)
    assert threads() == before


def test_open_of_a_leased_file_ends_when_the_lease_is_given_up(folder):
    path = os.path.join(folder, 'leased')
    with open(path, 'w') as file:
        file.write('here')
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with leased('give up', path):
            began = time.monotonic()
            fd = greenaio.os.open(path, flags)
            assert 0.1 < time.monotonic() - began < 10
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
            assert os.read(fd, 10) == b'here'
            os.close(fd)
    with leased('keep', path), pytest.raises(BlockingIOError):
        greenaio.os.open(path, os.O_RDONLY | os.O_NONBLOCK)


# Another device ----------------------------------------------------------------------------------

class Server:
    """A FUSE file system that remembers nothing in the kernel, and that can be stopped."""

    def __init__(self, folder, **options):
        if os.geteuid() != 0:
            missing('needs root')
        if importlib.util.find_spec('mfusepy') is None:
            missing('needs mfusepy')
        self.mount, self.control = os.path.join(folder, 'mount'), os.path.join(folder, 'control')
        os.mkdir(self.mount)
        with open(self.control, 'w'):
            pass
        options = {'attr_timeout': 0, 'entry_timeout': 0, 'negative_timeout': 0} | options
        program = os.path.join(os.path.dirname(__file__), 'faulty.py')
        self.process = subprocess.Popen(
            [sys.executable, program, self.mount, self.control,
             *[f'{name}={value}' for name, value in options.items()]])
        wait_until(lambda: is_mounted(self.mount))

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        for _ in range(50):
            with contextlib.suppress(subprocess.CalledProcessError):
                run('umount', self.mount)
                break
            time.sleep(0.1)
        self.process.wait(10)


@pytest.fixture
def server(tmp_path):
    found = Server(str(tmp_path))
    yield found
    found.close()


@pytest.mark.parametrize('way', ['link', 'chain', 'folder', 'long link', 'dots'])
def test_path_into_a_hung_mount_holds_up_no_disk_that_it_begins_on(server, disk_folder, way):
    run_program('path_into_hung_mount', disk_folder, server.mount, server.process.pid, way)


@pytest.mark.parametrize('way', ['link', 'folder of it', 'by number', 'working directory'])
def test_path_out_of_a_hung_mount_holds_up_no_disk_that_it_leads_to(tmp_path, disk_folder, way):
    """
        greenlet                    server          disk
        looks the name up           answers
        follows it                                  answers
        makes the call: looks       hangs
        the name up again
    """
    server = Server(str(tmp_path), nothreads=False)
    try:
        with open(f'{server.control}-link', 'w') as file:
            file.write(disk_folder)
        run_program('path_out_of_hung_mount', disk_folder, server.mount, f'{server.control}-again', way,
                   env={'GREENAIO_THREADS': '2'})
    finally:
        server.close()


def test_links_are_followed_as_far_as_the_kernel_follows_them(folder):
    path = os.path.join(folder, 'file')
    with open(path, 'w') as file:
        file.write('here')
    os.symlink('file', f'{path}-0')
    for i in range(45):
        os.symlink(f'file-{i}', f'{path}-{i + 1}')
    os.symlink('round', os.path.join(folder, 'round'))
    for name in (*[f'{path}-{i}' for i in (0, 38, 39, 40, 45)], os.path.join(folder, 'round'), f'{path}-1/'):
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT):
            try:
                os.close(os.open(name, flags))
                wanted = None
            except OSError as error:
                wanted = error.errno
            try:
                os.close(greenaio.os.open(name, flags))
                found = None
            except OSError as error:
                found = error.errno
            assert found == wanted, (name, flags)


def test_links_of_proc_lead_to_files_not_to_names(folder):
    path = os.path.join(folder, 'file')
    with open(path, 'w+') as file:
        file.write('here')
        file.flush()
        os.unlink(path)
        name = f'/proc/self/fd/{file.fileno()}'
        for flags in (os.O_RDONLY, os.O_RDWR):
            fd = greenaio.os.open(name, flags)
            assert os.pread(fd, 10, 0) == b'here'
            os.close(fd)
        assert greenaio.os.stat(name) == os.stat(name)
    folder_fd = os.open(folder, os.O_RDONLY)
    fd = greenaio.os.open(f'/proc/self/fd/{folder_fd}/new', os.O_RDWR | os.O_CREAT)
    assert os.path.exists(os.path.join(folder, 'new'))
    os.close(fd)
    os.close(folder_fd)


def test_file_is_created_below_a_link_and_below_a_directory_given_by_number(folder):
    os.mkdir(os.path.join(folder, 'there'))
    os.symlink('there', os.path.join(folder, 'link'))
    os.symlink('there/later', os.path.join(folder, 'dangling'))
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for name, made in (('link/new', 'there/new'), ('dangling', 'there/later'), ('link/../beside', 'beside')):
        os.close(greenaio.os.open(name, os.O_RDWR | os.O_CREAT, dir_fd=fd))
        assert os.path.isfile(os.path.join(folder, made))
        assert greenaio.os.stat(name, dir_fd=fd) == os.stat(name, dir_fd=fd)
    os.close(fd)


@pytest.mark.parametrize('how', ['as one reads', 'as one appends'])
def test_server_is_not_asked_whether_its_file_is_a_terminal(server, how):
    mode = {'as one reads': 'r', 'as one appends': 'ab'}[how]
    with greenaio.open(os.path.join(server.mount, 'data'), mode) as file:
        assert not file.isatty()
        assert file.tell() == (0 if mode == 'r' else 1 << 20)
        assert file.buffer.raw._blksize == 4096 if mode == 'r' else file.raw._blksize == 4096
    assert not os.path.exists(f'{server.control}-ioctl')


def test_opens_on_a_server_that_hangs_after_them_hold_up_no_other_server(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    hung, other = Server(str(tmp_path / 'a')), Server(str(tmp_path / 'b'))
    try:
        run_python('''
            import gevent, greenaio, os, signal, sys
            hung, server, other = sys.argv[1], int(sys.argv[2]), sys.argv[3]
            os.kill(server, signal.SIGSTOP)
            waiting = [gevent.spawn(greenaio.open, hung, 'ab') for _ in range(12)]
            gevent.sleep(0.2)
            with gevent.Timeout(10), greenaio.open(other, 'rb') as file:
                assert len(file.read(10)) == 10
            os.kill(server, signal.SIGCONT)
            for greenlet in waiting:
                greenlet.get(timeout=20).close()
        ''', os.path.join(hung.mount, 'data'), hung.process.pid, os.path.join(other.mount, 'data'))
    finally:
        hung.close()
        other.close()


COPIES = '''
import gevent, greenaio, greenaio.os, os, signal, sys
from greenaio import File, config
folder, mount, server = sys.argv[1], sys.argv[2], int(sys.argv[3])
source = os.open(f'{folder}/source', os.O_RDWR | os.O_CREAT)
os.write(source, bytes(8192))
target = os.open(f'{mount}/data', os.O_WRONLY)
os.kill(server, signal.SIGSTOP)
copies = [gevent.spawn(greenaio.os.sendfile, target, source, 0, 4096) for _ in range(3 * config.threads)]
try:
    gevent.sleep(0.2)
    with gevent.Timeout(10), File(f'{folder}/other', os.O_WRONLY | os.O_CREAT) as file:
        file.pwrite(b'x', 0)
    assert not any(greenlet.ready() for greenlet in copies)
finally:
    os.kill(server, signal.SIGCONT)
gevent.joinall(copies, timeout=20, raise_error=True)
assert [greenlet.value for greenlet in copies] == [4096] * len(copies)
os._exit(0)
'''


def test_copies_to_a_hung_mount_hold_up_no_disk_that_they_read_from(server, disk_folder):
    run_python(COPIES, disk_folder, server.mount, server.process.pid)


def test_file_that_comes_after_a_timeout_is_not_closed_in_the_hub(server):
    """
        greenlet           server               hub
        asks for the file  is stopped
        Timeout
                           opens it
                                                gets its number, and lets go of it
                           flush: hangs         goes on
    """
    engine, hangs = _hub.get_driver().engine, f'{server.control}-flush'
    with open(hangs, 'w'):
        server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
            greenaio.os.open(os.path.join(server.mount, 'data'), os.O_RDONLY)
        with subprocess.Popen(['sh', '-c', f'sleep 5; rm -f {hangs}']) as unhang:
            server.process.send_signal(signal.SIGCONT)
            wait_until(lambda: not engine.lent)
            gevent.sleep(0.05)
            assert os.path.exists(hangs), 'the hub waited for the flush'
            unhang.kill()
            os.unlink(hangs)
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_number_goes_to_no_other_file_while_a_server_is_told_of_its_close(server):
    fd = greenaio.os.open(os.path.join(server.mount, 'data'), os.O_RDONLY)
    hangs = f'{server.control}-flush'
    with open(hangs, 'w'):
        pass
    try:
        closing = gevent.spawn(greenaio.os.close, fd)
        gevent.sleep(0.1)               # the thread is in its call
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]
        assert not closing.ready()
        assert fd not in others
    finally:
        os.unlink(hangs)
    closing.get(timeout=10)
    for other in others:                # the end of the close has closed none of them
        os.close(other)


@pytest.mark.parametrize('forgets', ['greenlet', 'hub'])
@pytest.mark.parametrize('make', [lambda path: greenaio.File(path, os.O_RDONLY),
                                  lambda path: greenaio.open(path, 'rb', 0),
                                  lambda path: greenaio.open(path, 'rb'), greenaio.open],
                         ids=['File', 'raw', 'buffered', 'text'])
def test_forgotten_reader_of_a_server_that_hangs_is_not_closed_in_the_hub(server, make, forgets):
    hangs = f'{server.control}-flush'
    files = []
    gevent.spawn(lambda: files.append(make(os.path.join(server.mount, 'data')))).join(10)
    fd = files[0].fileno()
    with subprocess.Popen(['sh', '-c', f'sleep 5; rm -f {hangs}']) as unhang, warnings.catch_warnings():
        with open(hangs, 'w'):          # after the fork: a child closes all its files, which flushes them
            pass
        warnings.simplefilter('ignore', ResourceWarning)
        if forgets == 'hub':
            gevent.get_hub().loop.run_callback(files.clear)
            gevent.sleep(0.01)
        else:
            files.clear()
        gc.collect()
        waited = not os.path.exists(hangs)
        unhang.kill()
    assert not waited, 'the hub waited for the flush'
    os.unlink(hangs)
    wait_until(lambda: not os.path.exists(f'/proc/self/fd/{fd}'))


@pytest.mark.parametrize('call', ['stat', 'copyfile'])
def test_working_directory_on_a_server_that_hangs_is_not_asked_for_in_the_hub(tmp_path, call):
    server = Server(str(tmp_path), default_permissions=True)
    try:
        run_python('''
            import gevent, greenaio, greenaio.os, os, select, shutil, signal, subprocess, sys
            freeze = subprocess.Popen(['sh', '-c', f'read go; kill -STOP {sys.argv[2]}; echo; sleep 5; '
                                      f'echo; kill -CONT {sys.argv[2]}'],
                                      stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
            os.chdir(sys.argv[1])
            wanted = greenaio.os.stat('data').st_size
            freeze.stdin.write(b'go' + os.linesep.encode())
            freeze.stdin.flush()
            freeze.stdout.readline()
            if sys.argv[3] == 'stat':
                waiting = gevent.spawn(lambda: greenaio.os.stat('data').st_size)
            else:
                waiting = gevent.spawn(lambda: os.stat(greenaio.copyfile('data', sys.argv[4])).st_size)
            gevent.sleep(0.1)
            assert not select.select([freeze.stdout], [], [], 0)[0], 'the hub waited for the server'
            freeze.kill()
            os.kill(int(sys.argv[2]), signal.SIGCONT)
            assert waiting.get(timeout=10) == wanted
        ''', server.mount, str(server.process.pid), call, tmp_path / 'copy')
    finally:
        server.close()


# Containers --------------------------------------------------------------------------------------

USE = 'import tests.programs.usual_paths\n'


def deny(*numbers, code):
    return SECCOMP + ''.join(f'deny({number}, errno.{code})\n' for number in numbers)


@pytest.mark.parametrize('denied', [(), (OPENAT2,)], ids=['free', 'nothing is known to be cached'])
def test_path_from_the_root_has_nothing_to_do_with_the_working_directory(server, disk_folder, denied):
    run_python(deny(*denied, code='ENOSYS') + '''
import gevent, greenaio.os
from greenaio._core import pools as _pools
folder, mount = sys.argv[1:]
os.chdir(mount)
os.close(greenaio.os.open(f'{folder}/new', os.O_RDWR | os.O_CREAT))
assert os.stat(f'{folder}/new').st_dev in [pool.device for pool in _pools.pools()]
assert {pool.device for pool in _pools.pools()} <= {os.stat(folder).st_dev, os.stat('/').st_dev}
for path in '/', '//', '///etc//.//', f'{folder}//new', f'/{folder}/../':
    assert greenaio.os.stat(path) == os.stat(path), path
''', disk_folder, server.mount)


@pytest.mark.parametrize('denied, code', [
    ((), 'EPERM'), ((OPENAT2,), 'EPERM'), ((OPENAT2,), 'ENOSYS'), ((STATMOUNT,), 'EPERM'),
    ((OPENAT2, STATMOUNT), 'ENOSYS'),
])
def test_calls_that_a_sandbox_denies_change_no_result(folder, denied, code):
    done = run_python(deny(*denied, code=code) + USE, folder)
    assert done.stdout.strip() == run('stat', '-f', '-c', '%T', folder).strip().replace('ext2/ext3', 'ext4')


def test_openat2_is_not_asked_again_where_it_is_denied(disk_folder):
    """A second filter ends the process at the second try."""
    run_python(deny(OPENAT2, code='EPERM') + '''
import gevent, greenaio.os
greenaio.os.stat(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
filters = b''.join(struct.pack('HBBI', *f) for f in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 437), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7fff0000)])
memory = ctypes.create_string_buffer(filters)
program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4, ctypes.addressof(memory)))
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0
for _ in range(10):
    greenaio.os.stat(sys.argv[1])
    os.close(greenaio.os.open(sys.argv[1], os.O_RDONLY))
''', disk_folder)


@pytest.mark.parametrize('denied', [(), (STATMOUNT,)])
def test_hub_does_not_parse_the_list_of_mounts(tmp_path, denied):
    """In a mount namespace of many mounts; the hub reads none of it."""
    if os.geteuid() != 0:
        missing('needs root')
    done = run_python(deny(*denied, code='ENOSYS') + 'import tests.programs.many_mounts', tmp_path)
    assert done.stdout == 'known\n'


@pytest.mark.parametrize('mask', [FAN_OPEN_PERM, FAN_ACCESS_PERM])
def test_scanner_that_answers_late_holds_the_hub_once(disk_folder, mask):
    path = os.path.join(disk_folder, 'file')
    with open(path, 'w') as file:
        file.write('x' * 4096)
    with scanned(disk_folder, mask) as scanner:
        engine = _hub.get_driver().engine

        def use():
            """How many calls went to threads."""
            before = engine.by_thread
            fd = greenaio.os.open(path, os.O_RDONLY)
            if mask == FAN_OPEN_PERM:
                lent = engine.by_thread - before
            else:
                before = engine.by_thread
                assert greenaio.os.pread(fd, 4096, 0) == b'x' * 4096
                lent = engine.by_thread - before
            os.close(fd)
            return lent

        assert [use() for _ in range(4)] == [0, 1, 1, 1]
        scanner.kill()
        scanner.wait()
        assert sum(use() for _ in range(40)) < 40       # it is quick again, so they come back
        assert use() == 0
