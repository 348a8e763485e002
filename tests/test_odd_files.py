"""Files that are no bytes on a disk: the kernel's own, files without a position, devices."""

import contextlib
import ctypes
import importlib.util
import os
import posix
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import gevent
import pytest
from streaming import DATA

import greenaio
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from greenaio._files import device as _device
from greenaio._files import streams
from tests.support import missing
from tests.support.disks import FreezableDisk, pattern
from tests.support.processes import run, run_program, run_python


@pytest.fixture
def engine():
    return _hub.get_driver().engine


def outcome(function, *args):
    """What a call comes to: its value, or the kind of exception and its errno."""
    try:
        return function(*args)
    except OSError as error:
        return type(error), error.errno, error.strerror


def needs_root():
    if os.geteuid() != 0:
        missing('needs root')


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def let_the_hub_run():
    """A hub that is blocked comes back from this never, or too late."""
    for _ in range(20):
        gevent.sleep(0.001)


# Files that the kernel makes up ------------------------------------------------------------------

@pytest.mark.parametrize('path', ['/proc/self/stat', '/proc/thread-self/status', '/proc/meminfo',
                                  '/proc/uptime'])
def test_file_of_proc_that_answers_at_once_is_read_in_the_hub(engine, path):
    before = engine.by_thread
    with opened(path) as fd:
        assert len(greenaio.os.read(fd, 4096)) > 10
        assert len(greenaio.os.pread(fd, 4096, 0)) > 10
        buffer = bytearray(4096)
        assert greenaio.os.preadv(fd, [buffer], 0) > 10
        with File.from_fd(fd) as file:
            assert len(file.pread(4096, 0)) > 10
        os.lseek(fd, 0, os.SEEK_SET)
        raw = greenaio.open(fd, 'rb', 0, closefd=False)
        assert len(raw.read(4096)) > 10
        raw.close()
    assert engine.by_thread == before


@pytest.mark.parametrize('path', ['/proc/self/cmdline', '/proc/self/smaps', '/proc/sys/kernel/hostname',
                                  '/sys/kernel/mm/transparent_hugepage/enabled'])
def test_file_that_the_kernel_makes_up_is_read_by_one_call_in_a_thread(engine, path):
    if not os.path.exists(path):
        missing(f'no {path}')
    buffer = bytearray(1 << 16)
    with opened(path) as fd:
        for read in (lambda: greenaio.os.read(fd, 1 << 16), lambda: greenaio.os.pread(fd, 1 << 16, 0),
                     lambda: buffer[:greenaio.os.preadv(fd, [buffer], 0)],
                     lambda: File.from_fd(fd).pread(1 << 16, 0)):
            os.lseek(fd, 0, os.SEEK_SET)
            before = engine.by_thread
            assert read()[:5] == os.pread(fd, 1 << 16, 0)[:5]
            assert engine.by_thread == before + 1


def test_whole_file_of_proc_reads_as_plain():
    for path in ('/proc/self/limits', '/proc/self/cmdline', '/proc/self/environ', '/proc/filesystems'):
        with open(path, 'rb') as theirs, greenaio.open(path, 'rb') as ours:
            assert ours.read() == theirs.read()
        with open(path) as theirs, greenaio.open(path) as ours:
            assert list(ours) == list(theirs)
        with greenaio.open(path, 'rb', prefetch=4) as ours, open(path, 'rb') as theirs:
            assert ours.read(100) + ours.read() == theirs.read()


def test_file_of_the_calling_thread_is_the_callers():
    with opened('/proc/thread-self/stat') as fd:
        assert int(greenaio.os.read(fd, 100).split()[0]) == threading.get_native_id()


@pytest.mark.parametrize('write', [
    lambda fd, data: greenaio.os.write(fd, data), lambda fd, data: greenaio.os.writev(fd, [data]),
    lambda fd, data: greenaio.open(fd, 'wb', 0, closefd=False).write(data)], ids=['write', 'writev', 'file'])
def test_file_of_proc_that_has_a_position_but_no_pwrite_is_written(engine, write):
    with opened('/proc/self/comm', os.O_RDWR) as fd:
        name = os.read(fd, 100)
        before = engine.by_thread
        try:
            assert write(fd, b'renamed') == 7
            assert engine.by_thread > before
            assert os.pread(fd, 100, 0) == b'renamed\n'
        finally:
            os.write(fd, name.strip())


def test_write_into_proc_takes_a_thread(engine):
    with opened('/proc/self/oom_score_adj', os.O_RDWR) as fd:
        value = os.read(fd, 100)
        before = engine.by_thread
        os.lseek(fd, 0, os.SEEK_SET)
        assert greenaio.os.write(fd, value) == len(value)
        assert engine.by_thread == before + 1
        before = engine.by_thread
        greenaio.os.close(os.dup(fd))   # some take effect only then, as set_ftrace_filter
        assert engine.by_thread == before + 1


def test_read_of_the_mounts_leaves_the_news_of_a_change_to_the_reader(tmp_path):
    """poll tells of a change once: greenaio must not ask it."""
    needs_root()
    with opened('/proc/self/mountinfo') as fd:
        news = select.poll()
        news.register(fd, select.POLLPRI)
        greenaio.os.read(fd, 1 << 16)
        news.poll(0)
        run('mount', '-t', 'tmpfs', 'none', tmp_path)
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            assert str(tmp_path).encode() in greenaio.os.read(fd, 1 << 20)
            assert news.poll(0)
        finally:
            run('umount', tmp_path)


def test_zero_written_into_a_control_group_means_the_calling_thread():
    needs_root()
    root = '/sys/fs/cgroup/pids'
    if not os.path.exists(f'{root}/tasks'):
        missing('needs the pids controller of cgroup v1')
    group = f'{root}/greenaio-{os.getpid()}'
    os.mkdir(group)
    try:
        with opened(f'{group}/tasks', os.O_WRONLY) as fd:
            assert greenaio.os.write(fd, b'0') == 1
        with open(f'{group}/tasks') as file:
            assert file.read().split() == [str(threading.get_native_id())]
    finally:
        with open(f'{root}/tasks', 'w') as file:
            file.write('0')
        os.rmdir(group)


# Files that have events --------------------------------------------------------------------------

@pytest.fixture
def trace(tmp_path):
    """A folder of tracefs with a trace of our own."""
    needs_root()
    try:
        run('mount', '-t', 'tracefs', 'none', tmp_path)
    except subprocess.CalledProcessError:
        missing('needs tracefs')
    folder = f'{tmp_path}/instances/greenaio-{os.getpid()}'
    os.mkdir(folder)
    yield folder
    for _ in range(100):                # busy until the last thread has closed it
        try:
            os.rmdir(folder)
            break
        except OSError:
            time.sleep(0.02)
    run('umount', tmp_path)


def write_marker(trace, text):
    with opened(f'{trace}/trace_marker', os.O_WRONLY) as fd:
        posix.write(fd, text)


@pytest.mark.parametrize('mode', [None, 'wb', 'w'], ids=['os', 'raw', 'text'])
def test_trace_marker_is_written_by_the_calling_thread(trace, mode):
    """It records which thread wrote."""
    path = f'{trace}/trace_marker'
    if mode is None:
        with opened(path, os.O_WRONLY) as fd:
            assert greenaio.os.write(fd, b'mine\n') == 5
    else:
        with greenaio.open(path, mode, 0 if mode == 'wb' else -1) as file:
            assert file.write(b'mine\n' if mode == 'wb' else 'mine\n') == 5
    with open(f'{trace}/trace') as file:
        line, = [line for line in file if 'mine' in line]
    assert f'-{threading.get_native_id()} ' in line


def read_once(path):
    with opened(path) as fd:
        return greenaio.os.read(fd, 4096)


def readv_once(path):
    buffer = bytearray(4096)
    with opened(path) as fd:
        return buffer[:greenaio.os.readv(fd, [buffer])]


def read_line(*args):
    def reading(path):
        with greenaio.open(path, *args) as file:
            line = file.readline()
        return line if isinstance(line, bytes) else line.encode()
    return reading


READERS = [read_once, readv_once, read_line('rb'), read_line('rb', 0), read_line('r')]
NAMES = ['read', 'readv', 'buffered', 'raw, byte by byte', 'text']


@pytest.mark.parametrize('read', READERS, ids=NAMES)
def test_trace_pipe_is_read_as_by_os(trace, read):
    write_marker(trace, b'one\n')
    assert b'tracing_mark_write: one\n' in read(f'{trace}/trace_pipe')


@pytest.mark.parametrize('read', READERS, ids=NAMES)
def test_reader_waits_in_the_loop_for_a_line_of_trace_pipe(trace, read):
    reader = gevent.spawn(read, f'{trace}/trace_pipe')
    let_the_hub_run()
    assert not reader.ready()
    write_marker(trace, b'late\n')
    assert b'late\n' in reader.get(timeout=10)


def test_killed_reader_of_trace_pipe_takes_no_line_with_it(trace):
    with opened(f'{trace}/trace_pipe') as fd:
        reader = gevent.spawn(greenaio.os.read, fd, 4096)
        gevent.sleep(0.02)
        reader.kill()
        assert os.get_blocking(fd)
        write_marker(trace, b'kept\n')
        assert b'kept' in greenaio.os.read(fd, 4096)


def test_trace_pipe_that_does_not_block_says_so(trace):
    with opened(f'{trace}/trace_pipe', os.O_RDONLY | os.O_NONBLOCK) as fd:
        with pytest.raises(BlockingIOError):
            greenaio.os.read(fd, 4096)
        assert not os.get_blocking(fd)
    with greenaio.open(f'{trace}/trace_pipe', 'rb', 0, opener=lambda path, flags: os.open(
            path, flags | os.O_NONBLOCK)) as file:
        assert file.read(100) is None


def test_number_closed_while_its_reader_waits_for_an_event_reads_its_own_file(trace):
    fd = os.open(f'{trace}/trace_pipe', os.O_RDONLY)
    reader = gevent.spawn(greenaio.os.read, fd, 4096)
    gevent.sleep(0.02)
    greenaio.os.close(fd)
    with opened('/dev/zero') as other:
        assert other != fd
        write_marker(trace, b'mine\n')
        assert b'mine' in reader.get(timeout=10)


def test_file_object_closed_while_it_waits_for_an_event_ends_the_wait(trace):
    file = greenaio.open(f'{trace}/trace_pipe', 'rb', 0)
    reader = gevent.spawn(outcome, file.read, 100)
    gevent.sleep(0.02)
    file.close()
    assert reader.get(timeout=10)[1] == 9


# Files without a position ------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stream(tmp_path_factory):
    needs_root()
    if importlib.util.find_spec('mfusepy') is None:
        missing('needs mfusepy')
    mount = tmp_path_factory.mktemp('stream')
    server = os.path.join(os.path.dirname(__file__), 'streaming.py')
    process = subprocess.Popen([sys.executable, server, mount])
    end = time.monotonic() + 20
    while not os.path.exists(f'{mount}/stream') and time.monotonic() < end:
        time.sleep(0.01)
    yield f'{mount}/stream'
    run('umount', mount)
    process.wait(10)


def read_all(path, read):
    data = b''
    with opened(path) as fd:
        while part := read(fd):
            data += part
    return data


def readv_into(fd):
    parts = [bytearray(1000), bytearray(5000)]
    n = greenaio.os.readv(fd, parts)
    return b''.join(parts)[:n]


def test_file_without_a_position_is_read_as_by_os(stream, engine):
    before = engine.by_thread
    assert read_all(stream, lambda fd: greenaio.os.read(fd, 5000)) == DATA
    assert engine.by_thread > before
    assert read_all(stream, readv_into) == DATA
    for args in (('rb',), ('rb', 0), ('r',), ('r+b', 0)):
        with greenaio.open(stream, *args) as file:
            data = file.read()
            assert (data if isinstance(data, bytes) else data.encode()) == DATA
    with greenaio.open(stream) as file:
        assert sum(1 for _ in file) == DATA.count(b'\n')
    with greenaio.open(stream, 'rb', prefetch=4) as file:
        assert file.read(100) + file.read() == DATA
    with opened(stream) as fd:
        for ours, theirs in ((greenaio.os.pread, os.pread), (greenaio.os.read, os.read)):
            assert outcome(ours, fd, -1, *([0] if ours is greenaio.os.pread else [])) == outcome(
                theirs, fd, -1, *([0] if ours is greenaio.os.pread else []))
        assert outcome(greenaio.os.pread, fd, 10, 0) == outcome(os.pread, fd, 10, 0)


def test_file_without_a_position_is_written_as_by_os(stream):
    with opened(stream, os.O_WRONLY) as fd:
        assert greenaio.os.write(fd, b'abcd') == 4
        assert greenaio.os.writev(fd, [b'ab', b'cde']) == 5
    for mode in ('wb', 'r+b', 'ab'):
        with greenaio.open(stream, mode, 0) as file:
            assert file.write(b'abc') == 3
    with greenaio.open(stream, 'w') as file:
        file.write('text')


# Files in memory that is swapped out --------------------------------------------------------------

@pytest.fixture
def swapped(disk_folder, tmp_path):
    """A file in memory of which a half is swapped out."""
    needs_root()
    group = f'/sys/fs/cgroup/memory/greenaio-{os.getpid()}'
    if not os.path.exists('/sys/fs/cgroup/memory/memory.limit_in_bytes'):
        missing('needs the memory controller of cgroup v1')
    with contextlib.ExitStack() as undo:
        swap = f'{disk_folder}/swap'
        with opened(swap, os.O_RDWR | os.O_CREAT) as fd:
            os.posix_fallocate(fd, 0, 64 << 20)
        os.chmod(swap, 0o600)
        run('mkswap', swap)
        try:
            run('swapon', swap)
        except subprocess.CalledProcessError as error:
            missing(f'needs swap: {error.stderr}')
        undo.callback(run, 'swapoff', swap)
        run('mount', '-t', 'tmpfs', 'none', tmp_path)
        undo.callback(run, 'umount', tmp_path)
        os.mkdir(group)
        undo.callback(os.rmdir, group)
        with open(f'{group}/memory.limit_in_bytes', 'w') as limit:
            limit.write(str(12 << 20))
        run('sh', '-c', f'echo $$ >{group}/cgroup.procs; '
                        f'exec dd if=/dev/urandom of={tmp_path}/file bs=1M count=24')
        yield f'{tmp_path}/file'


@pytest.mark.parametrize('flags', [0, os.O_DIRECT], ids=['buffered', 'direct'])
@pytest.mark.parametrize('way', ['File', 'pread', 'read', 'file object', 'write'])
def test_part_of_a_file_in_memory_that_is_swapped_out_takes_a_thread(swapped, engine, flags, way):
    time.sleep(0.02)                    # how old may be what is known of swap
    with File(swapped, os.O_RDWR | flags) as file, greenaio.open(
            file.fileno(), 'rb', 0, closefd=False, prefetch=0) as raw:
        fd = file.fileno()
        memory = aligned_buffer(1 << 16)

        def use(at):
            os.lseek(fd, at, os.SEEK_SET)
            if way == 'write':
                return file.pwrite(memory, at)
            return {'File': lambda: file.pread(1 << 16, at),
                    'pread': lambda: greenaio.os.pread(fd, 1 << 16, at),
                    'read': lambda: greenaio.os.read(fd, 1 << 16),
                    'file object': lambda: raw.readinto(memory)}[way]()

        began = engine.by_thread
        parts = range(0, 24 << 20, 1 << 20)
        for at in parts:
            use(at)
        assert len(parts) // 4 < engine.by_thread - began
        last = engine.by_thread
        use(parts[-1])                  # it is in memory now
        assert engine.by_thread == last


def test_file_in_memory_takes_no_thread_where_no_swap_is_used(folder, engine):
    if not folder.startswith('/dev/shm'):
        pytest.skip('of files in memory')
    with open('/proc/swaps') as swaps:
        if any(int(line.split()[3]) for line in swaps.readlines()[1:]):
            pytest.skip('swap is in use')
    with File(f'{folder}/file', os.O_RDWR | os.O_CREAT) as file:
        before = engine.by_thread
        file.pwrite(bytes(1 << 16), 0)
        assert file.pread(1 << 16, 0) == bytes(1 << 16)
        assert engine.by_thread == before


# RWF_NOWAIT --------------------------------------------------------------------------------------

def test_file_that_knows_no_nowait_is_asked_once_and_not_held_against_its_file_system(stream):
    ordinary = stream.removesuffix('stream') + 'ordinary'
    with File(ordinary, os.O_RDONLY | os.O_DIRECT) as file, opened(ordinary, os.O_RDONLY | os.O_DIRECT) as fd:
        device = next(one for one in _device.devices() if one.number == file.device)
        memory = aligned_buffer(4096)
        for at in range(0, 1 << 20, 4096):
            at %= 1 << 14
            assert file.pread(4096, at) == DATA[at:at + 4096]
            assert greenaio.os.pread(fd, 4096, at) == DATA[at:at + 4096]
            assert streams.Block(file, True, memory, 4096, at).end() == 4096
        assert device.reads.state == 'asking'


def test_file_system_that_knows_no_nowait_is_not_asked_for_longer_and_longer():
    nowait = _device.Device(os.makedev(7, 250), 'overlay').reads
    for i in range(33):
        assert nowait.state == 'asking', i
        nowait.unsupported()
    assert nowait.state == 'unsupported'
    end = time.monotonic() + 10
    while nowait.state != 'asking' and time.monotonic() < end:
        time.sleep(0.05)
    nowait.unsupported()                # one is enough now
    assert nowait.state == 'unsupported'


@pytest.fixture(scope='module')
def btrfs(tmp_path_factory):
    needs_root()
    if shutil.which('mkfs.btrfs') is None:
        missing('needs mkfs.btrfs')
    folder = tmp_path_factory.mktemp('btrfs')
    with open(f'{folder}/image', 'wb') as image:
        image.truncate(128 << 20)
    run('mkfs.btrfs', '-q', f'{folder}/image')
    os.mkdir(f'{folder}/mount')
    run('mount', '-o', 'loop', f'{folder}/image', f'{folder}/mount')
    yield f'{folder}/mount'
    run('umount', f'{folder}/mount')


@pytest.fixture
def extents(btrfs):
    """A file of 16 extents of 4 KiB in an order of their own: under RWF_NOWAIT btrfs reads one at a time."""
    path = f'{btrfs}/extents'
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        for i in sorted(range(16), key=lambda i: i * 7 % 16):
            os.pwrite(fd, pattern(1 << 16)[i * 4096:(i + 1) * 4096], i * 4096)
            os.fsync(fd)
    return path


def vector(read, n):
    parts = [aligned_buffer(n // 4) for _ in range(4)]
    got = read(parts, 0)
    return b''.join(parts)[:got]


def begun(file, n):
    memory = aligned_buffer(n)
    return bytes(memory[:streams.Block(file, True, memory, n, 0).end()])


@pytest.mark.parametrize('read', [
    lambda file, n: file.pread(n, 0), lambda file, n: greenaio.os.pread(file.fileno(), n, 0),
    lambda file, n: greenaio.os.read(file.fileno(), n), lambda file, n: vector(file.preadv, n),
    lambda file, n: vector(lambda parts, _: greenaio.os.readv(file.fileno(), parts), n),
    lambda file, n: begun(file, n)], ids=['File', 'pread', 'read', 'preadv', 'readv', 'begin'])
def test_direct_read_of_many_extents_is_whole(extents, read):
    want = pattern(1 << 16)
    with opened(extents, os.O_RDONLY | os.O_DIRECT) as fd:
        memory = aligned_buffer(1 << 16)
        short = outcome(os.preadv, fd, [memory], 0, os.RWF_NOWAIT)
        assert short != 1 << 16, 'btrfs reads it whole: this shows nothing'
    with File(extents, os.O_RDONLY | os.O_DIRECT) as file:
        assert read(file, 1 << 16) == want
        file_end = (1 << 16) - 8192
        assert file.pread(1 << 16, 8192) == want[8192:]         # the end of the file is still one
        os.truncate(extents, file_end + 100)
        assert file.pread(1 << 16, 0) == want[:file_end + 100]
    with greenaio.open(extents, 'rb', direct=True) as file:
        assert file.read() == want[:file_end + 100]


# Devices -----------------------------------------------------------------------------------------

DEVICES = ['null', 'zero', 'full', 'random', 'urandom', 'cpu_dma_latency', 'hwrng', 'loop-control',
           'zram-control', 'net/tun', 'fuse', 'uinput', 'vhost-net', 'ptmx', 'mem', 'port']


@pytest.mark.parametrize('name', DEVICES)
def test_device_answers_as_to_os(name):
    """Some are refused by epoll, and some wait for nothing."""
    found = []
    for module in (os, greenaio.os):
        try:
            fd = os.open(f'/dev/{name}', os.O_RDWR | os.O_NOCTTY | (os.O_NONBLOCK if name == 'ptmx' else 0))
        except OSError as error:
            pytest.skip(f'/dev/{name}: {error.strerror}')
        try:
            read = outcome(module.read, fd, 4)
            answers = [len(read) if isinstance(read, bytes) else read,
                       outcome(module.readv, fd, [bytearray(4)])]
            if name not in ('mem', 'port'):
                answers += [outcome(module.write, fd, bytes(4)), outcome(module.writev, fd, [bytes(2)] * 2)]
            found.append(answers)
        finally:
            os.close(fd)
    assert found[0] == found[1]


def test_device_that_epoll_refuses_is_asked_in_a_thread(engine):
    """libev would take it for ready, and libuv raise."""
    if not os.access('/dev/cpu_dma_latency', os.R_OK):
        pytest.skip('needs /dev/cpu_dma_latency')
    with opened('/dev/cpu_dma_latency', os.O_RDWR) as fd:
        before = engine.by_thread
        assert len(greenaio.os.read(fd, 4)) == 4
        assert greenaio.os.readv(fd, [bytearray(4)]) == 0      # its number has been read
        assert greenaio.os.write(fd, bytes(4)) == 4
        assert greenaio.os.writev(fd, [bytes(4)]) == 4
        assert engine.by_thread == before + 4


@pytest.mark.parametrize('path, threads', [
    ('/proc/self/maps', 1), ('/proc/self/stat', 0), ('/etc/hostname', 0)])
def test_seek_of_a_file_whose_read_may_wait_is_left_to_a_thread(path, threads):
    """A read that was timed out goes on, and has the lock that the seek takes, too."""
    with greenaio.open(path, 'rb', 0) as file:
        expected = file.read(10)
        before = _hub.tally().by_thread
        assert file.seek(0) == 0
        assert _hub.tally().by_thread - before == threads
        assert file.seek(2, os.SEEK_CUR) == 2
        assert path == '/proc/self/stat' or file.read(8) == expected[2:]


@pytest.mark.parametrize('read', [lambda fd: greenaio.os.read(fd, 8192),
                                  lambda fd: greenaio.open(fd, 'rb', 0, closefd=False).read(8192)],
                         ids=['os', 'file'])
def test_reader_of_the_kernels_log_waits_in_the_loop(read):
    needs_root()
    with opened('/dev/kmsg') as fd:
        os.lseek(fd, 0, os.SEEK_END)
        found = []

        def follow():
            while not found or b'greenaio tests itself' not in found[-1]:   # others log as well
                found.append(read(fd))

        reader = gevent.spawn(follow)
        let_the_hub_run()
        assert not reader.ready()
        with opened('/dev/kmsg', os.O_WRONLY) as log:
            assert greenaio.os.write(log, b'greenaio tests itself\n') == 22
        reader.get(timeout=10)


def test_terminal_waits_in_the_loop():
    leader, follower = os.openpty()
    reader = gevent.spawn(greenaio.os.read, follower, 100)
    let_the_hub_run()
    assert greenaio.os.write(leader, b'typed\n') == 6
    assert reader.get(timeout=10) == b'typed\n'
    assert greenaio.os.read(leader, 100) == b'typed\r\n'      # its echo
    assert greenaio.os.write(follower, b'shown') == 5
    assert b'shown' in greenaio.os.read(leader, 100)
    os.close(leader)
    os.close(follower)


def test_terminal_with_little_room_left_is_not_waited_for_in_the_hub():
    """Nobody reads what is written to it."""
    done = run_python('''
        import gevent, greenaio.os, os
        leader, follower = os.openpty()
        def fill():
            while True:
                greenaio.os.write(follower, b'x' * 4000)
        filling = gevent.spawn(fill)
        gevent.sleep(0.5)
        print('goes on', filling.ready(), flush=True)
        os._exit(0)
    ''', timeout=20)
    assert done.stdout == 'goes on False\n'


@pytest.mark.parametrize('call', ['read', 'readv', 'write', 'writev'])
def test_pipe_that_another_process_was_quicker_at_is_not_waited_for_in_the_hub(call):
    run_program('quicker_process', call, timeout=20)


# Descriptors without a file ----------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def make_eventfd():
    fd = os.eventfd(0)
    return fd, lambda: greenaio.os.write(fd, (1).to_bytes(8, sys.byteorder))


def make_timerfd():
    fd = libc.timerfd_create(1, 0)
    return fd, lambda: libc.timerfd_settime(fd, 0, (ctypes.c_long * 4)(0, 0, 0, 1000), None)


def make_inotify(folder):
    fd = libc.inotify_init1(0)
    libc.inotify_add_watch(fd, folder.encode(), 0x100)      # IN_CREATE
    return fd, lambda: os.close(os.open(os.path.join(folder, 'new'), os.O_CREAT | os.O_WRONLY))


def make_signalfd():
    mask = ctypes.create_string_buffer(128)
    libc.sigemptyset(mask)
    libc.sigaddset(mask, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    return libc.signalfd(-1, mask, 0), lambda: signal.raise_signal(signal.SIGUSR2)


def make_socket():
    ours, theirs = socket.socketpair()
    return ours.detach(), lambda: (theirs.send(b'x'), theirs.close())


@pytest.mark.parametrize('make', [make_eventfd, make_timerfd, make_inotify, make_signalfd, make_socket])
def test_descriptor_that_has_an_event_is_waited_for_in_the_loop(tmp_path, make):
    fd, trigger = make(str(tmp_path)) if make is make_inotify else make()
    try:
        reader = gevent.spawn(greenaio.os.read, fd, 4096)
        let_the_hub_run()
        assert not reader.ready()
        trigger()
        assert reader.get(timeout=10)
    finally:
        os.close(fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})


# Block devices -----------------------------------------------------------------------------------

FROZEN = '''
import gevent, greenaio, greenaio.os, os, select, subprocess, sys
loop, freeze, thaw = sys.argv[1:]
fd, raw, buffered = os.open(loop, os.O_RDWR), greenaio.open(loop, 'r+b', 0), greenaio.open(loop, 'rb')
direct = greenaio.open(loop, 'rb', 0, direct=True)
assert len(raw.read(4096)) == 4096 and len(buffered.read(10)) == 10
assert len(greenaio.os.pread(fd, 4096, 0)) == 4096
with subprocess.Popen(['sh', '-c', f'{freeze}; echo; sleep 6; echo; {thaw}'], stdout=-1) as frozen:
    frozen.stdout.readline()
    cold = gevent.spawn(greenaio.os.pread, fd, 4096, 8 << 20)
    gevent.sleep(0.2)
    calls = [raw.tell, lambda: raw.seek(10), lambda: greenaio.os.read(fd, 10), lambda: raw.read(10),
             lambda: greenaio.os.pread(fd, 4096, 0), lambda: greenaio.open(loop, 'rb').close(), direct.tell,
             lambda: greenaio.open(loop, 'ab').close(), lambda: greenaio.os.write(fd, b'x'), buffered.tell]
    waiting = [gevent.spawn(call) for call in calls]
    gevent.sleep(0.5)
    waiting[0].kill()
    waiting[2].kill()
    gevent.sleep(0.5)
    assert not cold.ready()
    assert not select.select([frozen.stdout], [], [], 0)[0], 'the hub waited for the disk'
    frozen.stdout.read()
gevent.joinall([cold, *waiting], timeout=20, raise_error=True)
assert len(cold.value) == len(waiting[4].value) == 4096 and waiting[-1].value == 10
assert raw.seek(100) == raw.tell() == 100 and len(raw.read(10)) == 10 and raw.tell() == 110
os._exit(0)
'''


def test_seek_on_a_block_device_whose_disk_is_frozen_does_not_hold_the_hub(tmp_path):
    """The kernel locks a block device as long as a read through its page cache waits; lseek, too."""
    if os.geteuid() != 0:
        missing('needs root')
    for tool in ('nbdkit', 'nbdfuse', 'losetup'):
        if shutil.which(tool) is None:
            missing(f'needs {tool}')
    disk = FreezableDisk(str(tmp_path))
    try:
        loop = run('losetup', '-f', '--show', disk.path).strip()
        try:
            run_python(FROZEN, loop, *disk.commands())
        finally:
            subprocess.run(disk.commands()[1], shell=True, check=True)
            run('losetup', '-d', loop)
    finally:
        disk.close()
