"""greenaio.os beside os: all calls but the positional reads and writes."""

import contextlib
import errno
import fcntl
import gc
import os
import shutil
import socket
import tempfile
import time

import gevent
import pytest
from gevent import socket as gsocket

import greenaio
import greenaio.os
from greenaio import File
from greenaio._core import handle as _handle
from greenaio._core import hub as _hub
from greenaio._core.handle import using
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import run, run_program, run_python


def outcome(function, *args, **kwargs):
    """What a call comes to: its value, or the kind of exception and its errno and filename."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        return type(error), error.errno, error.strerror, error.filename
    except Exception as error:
        return type(error)


@pytest.fixture
def two(folder):
    """Two files alike, to do to one by os what is done to the other by greenaio.os."""
    fds = []
    for name in ('ours', 'theirs'):
        fd = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT)
        os.write(fd, pattern(65536))
        os.lseek(fd, 0, os.SEEK_SET)
        fds.append(fd)
    yield fds
    for fd in fds:
        os.close(fd)


def alike(two, name, *args):
    """Call *name* of both modules, each on its file; they must agree in result, position, size, bytes."""
    ours, theirs = two
    results = [outcome(getattr(module, name), fd, *args)
               for module, fd in ((greenaio.os, ours), (os, theirs))]
    states = [(os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_size, os.pread(fd, 1 << 20, 0))
              for fd in two]
    assert results[0] == results[1]
    assert states[0] == states[1]
    return results[0]


@pytest.mark.parametrize('name, args', [
    ('ftruncate', (100,)), ('ftruncate', (1 << 20,)), ('ftruncate', (-1,)), ('ftruncate', (0,)),
    ('posix_fallocate', (0, 200000)), ('posix_fallocate', (60000, 10000)), ('posix_fallocate', (0, 0)),
    ('posix_fallocate', (-1, 10)), ('read', (1000,)), ('read', (0,)), ('read', (-1,)), ('read', (1 << 20,)),
    ('write', (b'abc',)), ('write', (b'',)), ('write', ('text',)), ('writev', ([b'ab', b'', b'cd'],)),
    ('writev', ([],)), ('read', ('x',)), ('readv', (7,)),
])
def test_same_as_os(two, name, args):
    alike(two, name, *args)


def test_same_as_os_on_what_is_no_open_file():
    for name, args in (('ftruncate', (1,)), ('posix_fallocate', (0, 1)), ('read', (1,)), ('write', (b'x',)),
                       ('readv', ([bytearray(1)],)), ('writev', ([b'x'],)), ('fstat', ()), ('close', ())):
        for fd in (9999, -1):
            assert (outcome(getattr(greenaio.os, name), fd, *args)
                    == outcome(getattr(os, name), fd, *args)), (name, fd)


def test_read_and_write_move_the_position_of_the_kernel(two):
    for step in (('read', 5000), ('write', b'x' * 100), ('read', 10), ('writev', [b'1', b'2' * 4096]),
                 ('read', 60000), ('read', 60000), ('read', 10), ('write', b'the end'), ('read', 1)):
        alike(two, *step)


def test_readv_fills_the_buffers_and_moves_the_position(two):
    buffers = [[bytearray(10), bytearray(5000)] for _ in two]
    assert greenaio.os.readv(two[0], buffers[0]) == os.readv(two[1], buffers[1]) == 5010
    assert buffers[0] == buffers[1]
    assert os.lseek(two[0], 0, os.SEEK_CUR) == 5010


def test_append_lands_at_the_end(folder):
    path = os.path.join(folder, 'log')
    fds = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) for _ in range(2)]

    def log(fd, i):
        assert greenaio.os.write(fd, f'{i:07}\n'.encode()) == 8

    gevent.joinall([gevent.spawn(log, fds[i % 2], i) for i in range(100)], raise_error=True)
    with open(path) as file:
        assert sorted(file.read().split()) == [f'{i:07}' for i in range(100)]
    assert greenaio.os.write(fds[0], b'last') == 4
    assert os.lseek(fds[0], 0, os.SEEK_CUR) == 804
    for fd in fds:
        os.close(fd)


def test_greenlets_that_read_one_fd_get_each_its_own_part(disk_folder):
    path = os.path.join(disk_folder, 'shared')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    parts = [gevent.spawn(greenaio.os.read, fd, 4096) for _ in range(MIB // 4096)]
    gevent.joinall(parts, raise_error=True)
    assert sorted(part.value for part in parts) == sorted(
        pattern(MIB)[at:at + 4096] for at in range(0, MIB, 4096))
    os.close(fd)


@pytest.mark.parametrize('follow_symlinks', [True, False])
def test_stat_tells_what_os_stat_tells(folder, follow_symlinks):
    path = os.path.join(folder, 'file')
    with open(path, 'w') as file:
        file.write('x' * 5000)
    link = os.path.join(folder, 'link')
    os.symlink(path, link)
    os.utime(path, ns=(1234567890123456789, 987654321987654321))
    fd = os.open(folder, os.O_RDONLY)
    for args, kwargs in ((path, {}), (os.fsencode(link), {}), ('file', {'dir_fd': fd}), (folder, {}),
                         ('/dev/null', {}), ('/proc/self/status', {}), ('/no/such', {}), ('', {})):
        kwargs['follow_symlinks'] = follow_symlinks
        ours, theirs = outcome(greenaio.os.stat, args, **kwargs), outcome(os.stat, args, **kwargs)
        assert ours == theirs
        for name in dir(theirs):
            if name.startswith('st_') and '/proc' not in str(args):
                assert getattr(ours, name) == getattr(theirs, name), name
    assert greenaio.os.fstat(fd) == os.fstat(fd)
    os.close(fd)
    with open(path) as file:
        assert greenaio.os.stat(file.fileno()) == greenaio.os.fstat(file.fileno()) == os.stat(path)


def test_copy_file_range_between_positions_and_offsets(folder):
    paths = [os.path.join(folder, name) for name in 'ab']
    with open(paths[0], 'wb') as file:
        file.write(pattern(65536))
    source, target = os.open(paths[0], os.O_RDONLY), os.open(paths[1], os.O_RDWR | os.O_CREAT)
    assert greenaio.os.copy_file_range(source, target, 1000) == 1000
    assert greenaio.os.copy_file_range(source, target, 500, offset_src=3000) == 500
    assert greenaio.os.copy_file_range(source, target, 70000, 60000, 10) == 5536
    assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, target)] == [1000, 1500]
    want = bytearray(pattern(65536)[:1000] + pattern(65536)[3000:3500])
    want[10:10 + 5536] = pattern(65536)[60000:]
    assert os.pread(target, 10000, 0) == want
    for args in ((source, source, 10, 0, 5), (source, 9999, 1), (target, source, 1), (source, target, -1)):
        assert (outcome(greenaio.os.copy_file_range, *args)
                == outcome(os.copy_file_range, *args))
    os.close(source)
    os.close(target)


def test_sendfile_waits_in_the_loop_for_a_socket_that_is_full(data_file):
    fd = os.open(data_file, os.O_RDONLY)
    sender, receiver = socket.socketpair()
    sender.setblocking(False)
    ticks, received = [], bytearray()

    def send():
        at = 0
        while at < MIB:
            at += greenaio.os.sendfile(sender.fileno(), fd, at, MIB - at)
        return at

    def receive():
        receiver.setblocking(False)
        while len(received) < MIB:
            gevent.sleep(0.002)
            ticks.append(1)
            with contextlib.suppress(BlockingIOError):
                received.extend(receiver.recv(65536))

    job = gevent.spawn(send)
    gevent.spawn(receive).get(timeout=20)
    assert job.get(timeout=5) == MIB
    assert received == pattern(MIB)
    assert greenaio.os.sendfile(sender.fileno(), fd, MIB, 10) == 0
    assert len(ticks) > 5
    sender.close()
    receiver.close()
    os.close(fd)


def test_sendfile_that_waits_for_the_socket_keeps_its_file(folder):
    """
        sends, and waits: the socket is full
                                        closes the file; opens another: must not get the number
        goes on
    """
    for name, byte in (('mine', b'm'), ('other', b'O')):
        with open(os.path.join(folder, name), 'wb') as made:
            made.write(byte * 4 * MIB)
    sender, receiver = gsocket.socketpair()
    fd, at, opened, received = greenaio.os.open(os.path.join(folder, 'mine'), os.O_RDONLY), 0, [], bytearray()

    def send():
        nonlocal at
        while not opened:
            at += greenaio.os.sendfile(sender.fileno(), fd, at, 65536)
        sender.close()

    sending = gevent.spawn(send)
    gevent.sleep(0.1)
    greenaio.os.close(fd)
    opened += [os.open(os.path.join(folder, 'other'), os.O_RDONLY) for _ in range(3)]
    while data := receiver.recv(MIB):
        received += data
    sending.get()
    receiver.close()
    for other in opened:
        os.close(other)
    assert received == b'm' * at


@pytest.mark.parametrize('ends', ['fork', 'destroy'])
def test_fd_that_nobody_was_given_yet_is_closed(disk_folder, ends):
    """A thread has opened it, and no pass has handed it over."""
    run_program('ungiven_fd', os.path.join(disk_folder, 'new'), ends)


@pytest.mark.parametrize('kind', [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_message_goes_to_a_socket_in_one_piece(kind):
    gevent.get_hub()
    sender, receiver = socket.socketpair(socket.AF_UNIX, kind)
    with sender, receiver, greenaio.open(sender.fileno(), 'wb', 8192, closefd=False) as file:
        assert greenaio.os.write(sender.fileno(), pattern(10000)) == 10000
        assert receiver.recv(20000) == pattern(10000)
        assert greenaio.os.writev(sender.fileno(), [b'head', pattern(10000)]) == 10004
        assert receiver.recv(20000) == b'head' + pattern(10000)
        assert file.write(pattern(10000)) == 10000
        file.flush()
        assert receiver.recv(20000) == pattern(10000)


def test_pipe_waits_in_the_loop_both_ways():
    reader, writer = os.pipe()
    data = os.urandom(300000)

    def drain():
        got = bytearray()
        while len(got) < len(data):
            got += greenaio.os.read(reader, 65536)
        return got

    job = gevent.spawn(drain)
    gevent.sleep(0.01)                      # it waits, and the hub does not
    lent = _hub.get_driver().engine.by_thread
    assert greenaio.os.write(writer, data) == len(data)
    assert job.get(timeout=10) == data
    assert _hub.get_driver().engine.by_thread == lent
    os.close(writer)
    assert greenaio.os.read(reader, 10) == b''
    os.close(reader)


@pytest.mark.parametrize('path', ['/dev/null', '/dev/zero'])
def test_memory_devices_answer_at_once(path):
    fd = os.open(path, os.O_RDWR)
    assert greenaio.os.read(fd, 10) == os.read(fd, 10)
    assert greenaio.os.write(fd, b'abc') == 3
    os.close(fd)


def test_proc_is_read_as_os_reads_it():
    fd = os.open('/proc/self/status', os.O_RDONLY)
    data = b''
    while chunk := greenaio.os.read(fd, 100):
        data += chunk
    assert data.startswith(b'Name:') and len(data) > 500
    os.close(fd)


def test_close_of_a_written_file_is_left_to_a_thread(disk_folder):
    engine = _hub.get_driver().engine
    path = os.path.join(disk_folder, 'written')
    file = File(path, os.O_WRONLY | os.O_CREAT)
    file.pwrite(b'x', 0)
    fd, before = file.fileno(), engine.by_thread
    file.close()
    assert engine.by_thread == before + 1
    with pytest.raises(OSError):
        os.fstat(fd)
    fd = os.open(path, os.O_RDONLY)
    before = engine.by_thread
    greenaio.os.close(fd)
    assert engine.by_thread == before
    fd = os.open(path, os.O_WRONLY)
    gevent.get_hub().loop.run_callback(greenaio.os.close, fd)
    gevent.sleep(0.01)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_killed_while_it_waits_for_a_thread_to_close_the_file_is_closed_all_the_same(disk_folder):
    run_python('''
        import os, sys, gevent, greenaio.os
        folder = sys.argv[1]
        from tests.test_threads import Plug
        file = greenaio.File(folder + '/x', os.O_WRONLY | os.O_CREAT)
        fd = file.fileno()
        plug = Plug(folder, 1)
        closing = gevent.spawn(file.close)
        gevent.sleep(0.01)
        closing.kill()
        os.fstat(fd)
        plug.pull()
        gevent.sleep(0.05)
        try:
            os.fstat(fd)
        except OSError:
            pass
        else:
            raise AssertionError('still open')
    ''', disk_folder, env={'GREENAIO_THREADS': '1'})


def test_close_that_had_to_wait_for_others_takes_a_thread_too(disk_folder):
    """The last of them lets go of the number in the hub, as a rule."""
    engine = _hub.get_driver().engine
    file = File(os.path.join(disk_folder, 'written'), os.O_RDWR | os.O_CREAT)
    fd, before = file.fileno(), engine.by_thread
    with using(fd):
        file.close()
        os.fstat(fd)
        assert engine.by_thread == before
    assert engine.by_thread == before + 1
    assert _handle.is_closing(fd)
    with gevent.Timeout(10):
        while _handle.is_closing(fd):
            gevent.sleep(0.001)
    with pytest.raises(OSError):
        os.fstat(fd)


def without_a_name(folder, kind):
    """An fd of a file that only its fds keep: to close the last one frees its blocks."""
    path = os.path.join(folder, 'nameless')
    if kind == 'directory':
        os.mkdir(path)
        fd = os.open(path, os.O_RDONLY)
        os.rmdir(path)
        return fd
    if kind == 'O_TMPFILE':
        writer = os.open(folder, os.O_RDWR | os.O_TMPFILE)
    else:
        writer = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(writer, MIB)
    fd = os.open(f'/proc/self/fd/{writer}', os.O_PATH if kind == 'O_PATH' else os.O_RDONLY)
    os.close(writer)
    if kind == 'replaced':
        with open(path + '-new', 'w'):
            pass
        os.rename(path + '-new', path)
    elif kind != 'O_TMPFILE':
        os.unlink(path)
    return fd


def closed_by_file(fd):
    File.from_fd(fd, closefd=True).close()


def closed_by_with(fd):
    with greenaio.open(fd, 'rb', 0):
        pass


def closed_as_a_duplicate(fd):
    greenaio.os.close(os.dup(fd))
    os.close(fd)


@pytest.mark.parametrize('close', [greenaio.os.close, closed_by_file, closed_by_with, closed_as_a_duplicate])
@pytest.mark.parametrize('kind', ['unlinked', 'replaced', 'O_TMPFILE', 'directory', 'O_PATH'])
def test_close_of_a_file_without_a_name_is_left_to_a_thread(folder, kind, close):
    fd = without_a_name(folder, kind)
    if kind == 'directory' and (close is closed_by_with or folder.startswith('/dev/shm')):
        os.close(fd)
        pytest.skip('a directory is no file object, and in memory it has next to nothing to free')
    if kind == 'O_PATH' and close is closed_by_with:
        os.close(fd)
        pytest.skip('io takes no O_PATH')
    engine = _hub.get_driver().engine
    before = engine.by_thread
    close(fd)
    assert engine.by_thread == before + 1
    with pytest.raises(OSError):
        os.fstat(fd)


def test_close_that_is_the_first_call_of_its_hub_is_left_to_a_thread(disk_folder):
    run_python('''
        import os, sys, gevent, greenaio
        path = sys.argv[1] + '/unlinked'
        with open(path, 'wb') as file:
            file.write(b'x')
        file = greenaio.open(path, 'rb')        # no thread has a hub so far: this is the plain call
        os.unlink(path)
        gevent.get_hub()
        file.close()
        assert greenaio._core.hub.get_driver().engine.by_thread == 1
    ''', disk_folder)


def test_close_of_a_small_file_in_memory_without_a_name_takes_no_thread():
    path = f'/dev/shm/greenaio-small-{os.getpid()}'
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink(path)
    os.write(fd, b'spooled')
    engine = _hub.get_driver().engine
    before = engine.by_thread
    greenaio.os.close(fd)
    assert engine.by_thread == before


def test_close_in_the_hub_of_a_file_without_a_name_is_the_plain_one(disk_folder):
    fd = without_a_name(disk_folder, 'unlinked')
    seen = []
    gevent.get_hub().loop.run_callback(lambda: (greenaio.os.close(fd), seen.append(outcome(os.fstat, fd))))
    gevent.sleep(0.01)
    assert seen[0][1] == errno.EBADF


@pytest.mark.parametrize('make', [lambda fd: File.from_fd(fd, closefd=True),
                                  lambda fd: greenaio.open(fd, 'rb', 0), lambda fd: greenaio.open(fd, 'rb')],
                         ids=['File', 'raw', 'buffered'])
def test_finalizer_leaves_the_close_of_a_file_without_a_name_to_a_thread(disk_folder, make):
    file = make(without_a_name(disk_folder, 'unlinked'))
    fd, engine = file.fileno(), _hub.get_driver().engine
    before = engine.by_thread
    with pytest.warns(ResourceWarning):
        del file
        gc.collect()
    assert engine.by_thread == before + 1
    with gevent.Timeout(10):
        while _handle.is_closing(fd):
            gevent.sleep(0.001)
    assert outcome(os.fstat, fd)[1] == errno.EBADF


def test_close_of_no_open_file_is_ebadf():
    for fd in (9999, -1):
        with pytest.raises(OSError) as caught:
            greenaio.os.close(fd)
        assert caught.value.errno == errno.EBADF


def test_closed_while_it_is_read_at_the_position_the_next_file_keeps_its_own(disk_folder):
    path = os.path.join(disk_folder, 'file')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reader = gevent.spawn(greenaio.os.read, fd, MIB)
    gevent.sleep(0)
    greenaio.os.close(fd)
    other = os.open('/proc/self/mounts', os.O_RDONLY)
    assert other != fd or reader.ready()
    assert reader.get(timeout=10) == pattern(MIB)
    assert os.lseek(other, 0, os.SEEK_CUR) == 0
    os.close(other)
    gevent.sleep(0)


# At hand -----------------------------------------------------------------------------------------

def test_cached_path_is_opened_and_asked_about_without_a_thread(folder):
    engine = _hub.get_driver().engine
    path = os.path.join(folder, 'cached')
    with open(path, 'w') as file:
        file.write('here')
    os.symlink('cached', path + '-link')
    time.sleep(0.05)                    # or its access time is due each time, in this tick of the clock
    os.stat(path), os.stat(path + '-link'), os.lstat(path + '-link'), os.path.exists(path + '-not')
    before = engine.by_thread
    for name in (path, path + '-link', os.fsencode(path)):
        fd = greenaio.os.open(name, os.O_RDONLY)
        assert os.read(fd, 10) == b'here'
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK | os.O_PATH) == os.O_RDONLY
        assert greenaio.os.fstat(fd) == os.fstat(fd)
        assert greenaio.os.stat(name) == os.stat(name)
        assert greenaio.os.stat(name, follow_symlinks=False) == os.lstat(name)
        greenaio.os.close(fd)
    for call in (lambda: greenaio.os.open(path + '-not', os.O_RDONLY),
                 lambda: greenaio.os.stat(path + '-not')):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.filename == path + '-not'
    # tmpfs remembers nothing that is not there
    assert engine.by_thread == before + (1 if folder.startswith('/dev/shm') else 0)
    with pytest.raises(OSError, match='symbolic links') as caught:
        greenaio.os.open(path + '-link', os.O_RDONLY | os.O_NOFOLLOW)
    assert caught.value.errno == errno.ELOOP


def test_cached_fifo_is_not_opened_here(folder):
    path = os.path.join(folder, 'fifo')
    os.mkfifo(path)
    os.stat(path)
    reader = gevent.spawn(greenaio.os.open, path, os.O_RDONLY)
    gevent.sleep(0.02)
    assert not reader.ready()
    writer = os.open(path, os.O_RDWR)
    os.close(reader.get(timeout=5))
    os.close(writer)


def test_who_only_opens_what_is_cached_starves_nobody(data_file):
    ticks, end = [], time.monotonic() + 0.3

    def tick():
        while True:
            gevent.sleep(0.001)
            ticks.append(1)

    ticker = gevent.spawn(tick)
    while time.monotonic() < end:
        greenaio.os.close(greenaio.os.open(data_file, os.O_RDONLY))
        greenaio.os.stat(data_file)
    ticker.kill()
    assert len(ticks) > 10


def test_large_file_in_memory_is_truncated_in_a_thread():
    """To free a gigabyte takes 0.3 s."""
    engine = _hub.get_driver().engine
    with tempfile.TemporaryFile(dir='/dev/shm') as file:
        for size, threads in ((MIB, 1), (4096, 0)):
            file.truncate(size)
            before = engine.by_thread
            greenaio.os.ftruncate(file.fileno(), 0)
            assert os.fstat(file.fileno()).st_size == 0
            assert engine.by_thread == before + threads


def test_block_device_is_closed_in_a_thread(disk_folder):
    """The last close of it writes what any process has left dirty."""
    if os.geteuid() != 0 or shutil.which('losetup') is None:
        missing('needs root and losetup')
    image = os.path.join(disk_folder, 'image')
    with open(image, 'wb') as file:
        file.truncate(MIB)
    loop = run('losetup', '-f', '--show', image).strip()
    try:
        engine = _hub.get_driver().engine
        fd = greenaio.os.open(loop, os.O_RDONLY)
        before = engine.by_thread
        greenaio.os.close(fd)
        assert engine.by_thread == before + 1
    finally:
        run('losetup', '-d', loop)
