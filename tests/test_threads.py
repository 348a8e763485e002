"""What native AIO can't do: in line where the page cache has it, else by a native thread of its device."""

import contextlib
import errno
import os
import socket
import tempfile
import threading
import time

import gevent
import pytest
from greenlet import settrace

import greenaio.os
from greenaio import File, config
from greenaio._core import hub as _hub
from greenaio._core import pools as _pools
from greenaio._files import device as _device
from greenaio._files import route as _route
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import run_program, run_python


@pytest.fixture
def engine():
    return _hub.get_driver().engine


@pytest.fixture
def cold_file(disk_folder):
    """A file on a disk, and a function that throws bytes of it out of the page cache."""
    path = os.path.join(disk_folder, 'cold')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDONLY)

    def forget(offset=0, nbytes=0):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    forget()
    yield fd, forget
    os.close(fd)


class Plug:
    """Keeps threads of one device busy: each sends a file of it into a pipe that is full."""

    def __init__(self, folder, count):
        self.file = tempfile.TemporaryFile(dir=folder)      # noqa: SIM115  # `pull` closes it
        self.file.truncate(MIB)
        self.reader, self.writer = os.pipe()
        self.greenlets = [gevent.spawn(self._send) for _ in range(count)]
        gevent.sleep(0.05)

    def _send(self):
        with contextlib.suppress(BrokenPipeError):
            while True:                 # the first fills the pipe
                greenaio.os.sendfile(self.writer, self.file.fileno(), 0, MIB)

    def pull(self):
        os.close(self.reader)           # lets all of them go
        gevent.joinall(self.greenlets, timeout=10)
        os.close(self.writer)
        self.file.close()


def test_page_cache_hit_never_switches(data_file, engine):
    fd = os.open(data_file, os.O_RDONLY)
    buffers = [bytearray(100), bytearray(5000)]
    file = File(data_file)
    os.pread(fd, MIB, 0)
    gevent.sleep(0.01)
    calls = (lambda: greenaio.os.pread(fd, 5000, 777), lambda: file.pread(5000, 777),
             lambda: file.preadv(buffers, 4000))
    lent, rounds = engine.by_thread, []
    for _ in range(20):             # a slow machine ends a bounded run by time now and then
        gevent.sleep(0.001)
        switches = []
        settrace(lambda event, pair, switches=switches: switches.append(event))
        try:
            for call, result in zip(calls, (pattern(MIB)[777:5777], pattern(MIB)[777:5777], 5100)):
                _pools.forgive()  # a call that lost the processor looks as if it had waited in the hub
                assert call() == result
        finally:
            settrace(None)
        assert b''.join(buffers) == pattern(MIB)[4000:9100]
        rounds.append(len(switches))
    assert rounds.count(0) > 10
    assert engine.by_thread == lent
    file.close()
    os.close(fd)


def test_greenlet_that_only_hits_starves_nobody(data_file):
    ticks, end = [], time.process_time() + 0.3      # of the processor: others may have it for a while

    def tick():
        while True:
            gevent.sleep(0.001)
            ticks.append(1)

    ticker = gevent.spawn(tick)
    with File(data_file) as file:
        while time.process_time() < end:
            file.pread(4096, 0)
    ticker.kill()
    assert len(ticks) > 20


def test_miss_takes_a_thread_of_its_device(cold_file, engine):
    fd, _ = cold_file
    lent = []
    for offset in range(0, MIB, 16384):         # a quick disk may have filled the page before we look again
        for _ in range(2):
            _pools.forgive()        # a read that lost the processor sends the next one to a thread
            before = engine.by_thread
            assert greenaio.os.pread(fd, 4096, offset) == pattern(MIB)[offset:offset + 4096]
            lent.append(engine.by_thread - before)
    assert set(lent[::2]) <= {0, 1}
    assert sum(lent[::2]) > 0
    assert set(lent[1::2]) == {0}               # it is in the cache now
    assert os.stat(fd).st_dev in [pool.device for pool in _pools.pools()]


@pytest.mark.parametrize('count', [1, 3])
def test_part_that_was_there_is_kept(cold_file, engine, count):
    fd, forget = cold_file
    n = 65536
    os.pread(fd, n // 2, 0)
    before = engine.by_thread
    if count == 1:
        assert greenaio.os.pread(fd, n, 0) == pattern(MIB)[:n]
    else:
        buffers = [bytearray(n // 4), bytearray(n // 4 + 999), bytearray(n // 2 - 999)]
        assert greenaio.os.preadv(fd, buffers, 0) == n
        assert b''.join(buffers) == pattern(MIB)[:n]
    assert engine.by_thread <= before + 1          # none, where read-ahead was quick


def test_end_of_the_file_needs_no_thread(cold_file, engine):
    fd, _ = cold_file
    os.pread(fd, MIB, 0)
    before = engine.by_thread
    assert greenaio.os.pread(fd, 4096, MIB - 100) == pattern(MIB)[-100:]
    assert greenaio.os.pread(fd, 4096, MIB) == b''
    assert engine.by_thread == before


def test_large_read_is_copied_by_a_thread(data_file, engine):
    with File(data_file) as file:
        before = engine.by_thread
        assert file.pread(MIB, 0) == pattern(MIB)
    assert engine.by_thread == before + 1


ONE_THREAD = '''
import os, sys, gevent, greenaio.os
from greenaio._core import hub as _hub, pools as _pools
folder = sys.argv[1]
from tests.test_threads import Plug
plug = Plug(folder, 1)
def pull():
    plug.pull()
    gevent.sleep(0.05)
'''


def test_threads_are_bounded_and_first_in_first_out(folder):
    run_python(ONE_THREAD + '''
order = []
def create(i):
    with greenaio.File(folder + '/log', os.O_WRONLY | os.O_CREAT):
        order.append(i)
greenlets = [gevent.spawn(create, i) for i in range(20)]
gevent.sleep(0.05)
assert order == []
pool, = _pools.pools()
assert (pool.threads, pool.queued, pool.device) == (1, 20, os.stat(folder).st_dev)
pull()
gevent.joinall(greenlets, timeout=10, raise_error=True)
assert order == list(range(20))
assert (pool.threads, pool.queued) == (1, 0)
''', folder, env={'GREENAIO_THREADS': '1'})


def test_killed_before_a_thread_began_it_never_happens(folder):
    run_python(ONE_THREAD + '''
path = folder + '/never'
with gevent.Timeout(0.01, False):
    greenaio.os.open(path, os.O_WRONLY | os.O_CREAT)
greenlet = gevent.spawn(greenaio.os.open, path, os.O_WRONLY | os.O_CREAT)
gevent.sleep(0.01)
greenlet.kill()
assert len(_hub.get_driver().engine.lent) == 1                  # the plug's
pull()
assert not os.path.exists(path)
''', folder, env={'GREENAIO_THREADS': '1'})


def test_device_that_hangs_holds_up_no_other(cold_file):
    fd, forget = cold_file
    folder = '/dev/shm' if os.path.isdir('/dev/shm') else missing('no /dev/shm')
    plug = Plug(folder, config.threads + 20)
    try:
        with gevent.Timeout(5):
            for i in range(20):
                forget()
                assert greenaio.os.pread(fd, 4096, i * 4096) == pattern(MIB)[i * 4096:(i + 1) * 4096]
            socket.getaddrinfo('localhost', 80)
            gevent.get_hub().threadpool.apply(time.sleep, (0,))
    finally:
        plug.pull()


def test_called_in_the_hub_it_raises_and_opens_nothing(data_file):
    caught = []

    def callback():
        for call in (lambda: greenaio.os.open(data_file, os.O_RDONLY), lambda: File(data_file)):
            try:
                call()
            except gevent.exceptions.BlockingSwitchOutError:
                caught.append(1)

    gevent.get_hub().loop.run_callback(callback)
    gevent.sleep(0.01)
    assert caught == [1, 1]


@pytest.mark.parametrize('path, kind', [
    ('/no/such/file', FileNotFoundError), ('/etc/passwd/x', NotADirectoryError),
    ('/proc', IsADirectoryError)])
def test_open_fails_as_os_does(path, kind):
    with pytest.raises(kind) as theirs:
        os.open(path, os.O_RDWR)
    for opener in (greenaio.os.open, File):
        with pytest.raises(kind) as ours:
            opener(path, os.O_RDWR)
        assert ours.value.args == theirs.value.args
        assert ours.value.filename == theirs.value.filename


def test_open_takes_what_os_open_takes(folder):
    fd = greenaio.os.open(os.fsencode(folder), os.O_RDONLY | os.O_DIRECTORY)
    inner = greenaio.os.open('new', os.O_RDWR | os.O_CREAT, 0o640, dir_fd=fd)
    assert os.fstat(inner).st_mode & 0o777 == 0o640 & ~_umask()
    assert not os.get_inheritable(inner)
    with pytest.raises(ValueError, match='null'):
        greenaio.os.open('a\0b', os.O_RDONLY)
    with pytest.raises(TypeError):
        greenaio.os.open(1.5, os.O_RDONLY)
    os.close(inner)
    os.close(fd)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_several_hubs_share_the_threads_of_a_device(data_file):
    def work():
        try:
            with File(data_file) as file:
                jobs = [gevent.spawn(file.pread, MIB, 0) for _ in range(20)]
                gevent.joinall(jobs, raise_error=True)
                results.append({job.value == pattern(MIB) for job in jobs})
        finally:
            gevent.get_hub().destroy(True)

    results = []
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        gevent.sleep(0.01)
    assert results == [{True}] * 4
    device = os.stat(data_file).st_dev
    assert [1 for pool in _pools.pools() if pool.device == device and pool.threads <= config.threads]


def test_hub_destroyed_with_a_call_at_a_thread_leaks_nothing(folder):
    run_program('hub_ends_with_call_at_thread', folder)


def test_forked_child_has_threads_of_its_own_and_the_parent_loses_nothing(folder):
    run_python('''
        import errno, os, sys, gevent, greenaio.os
        folder = sys.argv[1]
        os.mkfifo(folder + '/fifo')
        def wait():
            try:
                return greenaio.os.open(folder + '/fifo', os.O_RDONLY)
            except OSError as error:
                return -error.errno
        waiting = gevent.spawn(wait)
        gevent.sleep(0.05)
        pid = gevent.os.fork_gevent()
        if pid == 0:
            assert waiting.get(timeout=5) == -errno.ECANCELED
            with greenaio.File(folder + '/child', os.O_WRONLY | os.O_CREAT) as file:
                file.pwrite(b'child', 0)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert open(folder + '/child').read() == 'child'
        writer = os.open(folder + '/fifo', os.O_RDWR)
        os.close(waiting.get(timeout=5))
    ''', folder)


@pytest.fixture
def group():
    """A control group that may limit the number of threads."""
    path = f'/sys/fs/cgroup/pids/greenaio-{os.getpid()}'
    if os.geteuid() != 0 or not os.path.exists('/sys/fs/cgroup/pids/cgroup.procs'):
        missing('needs root and the pids controller of cgroup v1')
    os.mkdir(path)
    yield path
    os.rmdir(path)


def test_where_no_thread_can_be_started_it_is_the_plain_call_and_a_warning(folder, group):
    run_program('no_thread_to_be_had', folder, group)


def test_where_no_thread_can_be_started_a_call_takes_one_that_has_hardly_come_to_rest(tmp_path, group):
    run_python('''
        import os, sys, greenaio.os
        folder, group = sys.argv[1:]
        os.mkfifo(folder + '/fifo')
        peer = os.open(folder + '/fifo', os.O_RDWR)
        os.close(greenaio.os.open(folder + '/fifo', os.O_RDONLY))
        open(group + '/cgroup.procs', 'w').write(str(os.getpid()))
        open(group + '/pids.max', 'w').write(str(len(os.listdir('/proc/self/task'))))
        for i in range(2000):           # else there is a warning
            os.close(greenaio.os.open(folder + '/fifo', os.O_RDONLY))
        open('/sys/fs/cgroup/pids/cgroup.procs', 'w').write(str(os.getpid()))
    ''', tmp_path, group)


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_where_no_thread_can_be_started_an_open_waits_for_another_process_beside_the_hub(
        disk_folder, loop, group):
    """The other process has a lease on a file, and opens the other end of a FIFO when it is told to."""
    run_python('''
        import fcntl, logging, os, signal, sys, time, gevent, greenaio.os
        logging.getLogger('greenaio').addHandler(logging.NullHandler())
        folder, group = sys.argv[1:]
        fifo, told, done = folder + '/fifo', os.pipe(), os.pipe()
        os.mkfifo(fifo)
        pid = os.fork()
        if pid == 0:
            os.close(told[1])
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
            fd = os.open(folder + '/leased', os.O_RDWR | os.O_CREAT)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(done[1], b'.')
            while flags := os.read(told[0], 1):
                time.sleep(0.3)
                fd = os.open(fifo, int(flags))
                if int(flags) == os.O_WRONLY:
                    os.write(fd, b'x')
                else:
                    assert os.read(fd, 1) == b'y'
                os.close(fd)
                os.write(done[1], b'.')
            os._exit(0)
        os.read(done[0], 1)
        greenaio.os.stat(folder)                # the hub's driver is there
        fds = len(os.listdir('/proc/self/fd'))
        open(group + '/cgroup.procs', 'w').write(str(os.getpid()))
        open(group + '/pids.max', 'w').write(str(len(os.listdir('/proc/self/task'))))
        with gevent.Timeout(1.5, False):        # the hub does not wait: the timer ends it
            greenaio.os.open(folder + '/leased', os.O_RDONLY)
            raise AssertionError
        for flags in os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC:
            with gevent.Timeout(0.2, False):
                greenaio.os.open(fifo, flags)
                raise AssertionError
            killed = gevent.spawn(greenaio.os.open, fifo, flags)
            gevent.sleep(0.05)
            killed.kill()
            assert len(os.listdir('/proc/self/fd')) == fds
            opening = gevent.spawn(greenaio.os.open, fifo, flags)
            gevent.sleep(0.05)
            os.write(told[1], b'1' if flags == os.O_RDONLY else b'0')
            fd = opening.get(timeout=10)
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) == flags & os.O_ACCMODE
            if flags == os.O_RDONLY:
                assert os.read(fd, 10) == b'x' and os.read(fd, 10) == b''
            else:
                os.write(fd, b'y')
            os.close(fd)
            os.read(done[0], 1)
        ends = [gevent.spawn(greenaio.os.open, fifo, flags) for flags in (os.O_RDONLY, os.O_WRONLY)]
        for fd in [end.get(timeout=10) for end in ends]:
            os.close(fd)
        try:
            greenaio.os.open(fifo, os.O_RDONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError as error:
            assert error.filename == fifo
        else:
            raise AssertionError
        open(group + '/pids.max', 'w').write('max')
        open('/sys/fs/cgroup/pids/cgroup.procs', 'w').write(str(os.getpid()))
        os.close(told[1])
        os.waitpid(pid, 0)
    ''', disk_folder, group, env={'GEVENT_LOOP': loop})


def test_write_beyond_the_end_and_append_keep_their_order(disk_folder, engine):
    path = os.path.join(disk_folder, 'log')
    with File(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
        block = greenaio.aligned_buffer(4096)
        before = engine.by_thread
        for i in range(16):
            block[:] = bytes([i]) * 4096
            assert file.pwrite(block, i * 4096) == 4096         # longer by a block each: by a thread
        assert engine.by_thread - before == 16
        file.fsync()
        before = engine.by_thread
        for i in range(15, -1, -1):
            block[:] = bytes([i + 100]) * 4096
            assert file.pwrite(block, i * 4096) == 4096         # over what is there: native AIO
        assert engine.by_thread - before <= 8
        assert file.pread(65536, 0) == b''.join(bytes([i + 100]) * 4096 for i in range(16))


def test_dirty_pages_under_a_direct_read_are_left_to_a_thread(disk_folder, engine):
    path = os.path.join(disk_folder, 'dirty')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        file.flush()
        with File(path, os.O_RDONLY | os.O_DIRECT) as direct:
            before = engine.by_thread
            assert direct.pread(MIB, 0) == pattern(MIB)
            assert engine.by_thread > before


@pytest.mark.parametrize('code', ['EBADF', 'EISDIR', 'ESPIPE'])
def test_every_way_gives_the_same_errno(folder, code):
    fd = {'EBADF': lambda: os.open(os.path.join(folder, 'w'), os.O_WRONLY | os.O_CREAT),
          'EISDIR': lambda: os.open(folder, os.O_RDONLY), 'ESPIPE': lambda: os.pipe()[0]}[code]()
    for call in (lambda: greenaio.os.pread(fd, 10, 0), lambda: greenaio.os.preadv(fd, [bytearray(10)], 0),
                 lambda: greenaio.os.preadv(fd, [bytearray(MIB)], 0), lambda: File.from_fd(fd).pread(10, 0)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == getattr(errno, code)
    os.close(fd)
    if code == 'ESPIPE':
        os.close(fd + 1)


def test_file_whose_submissions_stall_takes_threads_for_a_while(cold_file, engine, caplog):
    fd, _ = cold_file
    path = os.readlink(f'/proc/self/fd/{fd}')
    with File(path, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)
        before = engine.submitted, _route.demotions()
        file._stalled(30_000_000)
        assert _route.demotions() == before[1] + 1
        for i in range(5):
            assert file.pread(4096, i * 4096) == pattern(MIB)[i * 4096:(i + 1) * 4096]
        raw = os.open(path, os.O_RDONLY | os.O_DIRECT)      # the same file by another fd
        assert greenaio.os.pread(raw, 4096, 0) == pattern(MIB)[:4096]
        os.close(raw)
        assert engine.submitted == before[0]
        _route.forgive()
        file.pread(4096, 0)
        assert engine.submitted == before[0] + 1
    if before[1] == 0:
        assert [record.levelname for record in caplog.records if 'held io_submit' in record.message]


ASK, PLAIN, THREAD = 'native AIO, asked not to wait', 'native AIO', 'thread'


@pytest.mark.parametrize('file_system, answer, ways', [
    ('ext4', 'done', (ASK, ASK)), ('ext4', 'again', (THREAD, THREAD)), ('ext4', 'unknown', (THREAD, THREAD)),
    ('xfs', 'done', (ASK, ASK)), ('xfs', 'again', (THREAD, PLAIN)), ('xfs', 'unknown', (THREAD, THREAD)),
    ('tmpfs', 'unknown', (PLAIN, PLAIN)), ('fuse', 'unknown', (THREAD, THREAD)),
])
def test_way_follows_what_the_file_system_answered(file_system, answer, ways):
    """xfs refuses NOWAIT to each overwrite, which would not wait; and to reads that would."""
    device = _device.Device(os.makedev(7, 250), file_system)
    for direction in (device.reads, device.writes):
        for _ in range(64):
            if answer == 'unknown':
                direction.unsupported()
            else:
                direction.answered(answer == 'again')
    assert device.ways() == ways
    if answer == 'again':
        assert device.reads.state == 'pausing'


def test_half_of_the_answers_must_be_refusals_before_it_stops_asking():
    device = _device.Device(os.makedev(7, 250), 'ext4')
    for i in range(200):
        device.reads.answered(i % 2 == 0)
    assert device.reads.state == 'asking'
    for _ in range(3):
        device.reads.answered(True)
    assert device.reads.state == 'pausing'
    deadline = time.monotonic() + 10
    while device.reads.state != 'asking' and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in range(2):                  # nor does it bear a grudge
        assert device.reads.state == 'asking'
        device.reads.answered(True)


def test_fsync_of_a_folder_takes_a_thread(disk_folder, engine):
    fd = os.open(disk_folder, os.O_RDONLY | os.O_DIRECTORY)
    before = engine.by_thread
    greenaio.os.fsync(fd)
    with File(disk_folder, os.O_RDONLY | os.O_DIRECTORY) as file:
        file.fdatasync()
    assert engine.by_thread - before >= 2
    os.close(fd)
