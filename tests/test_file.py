"""File and greenaio.os beside os itself, on a disk and in memory, direct and buffered."""

import ctypes
import errno
import gc
import io
import os
import socket
import warnings

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from greenlet import settrace

import greenaio
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import dispatch as _dispatch
from greenaio._core import hub as _hub
from greenaio._core.context import Opcode
from greenaio._core.request import Request, State
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import run_python

DIRECT = [0, os.O_DIRECT]


@pytest.fixture(params=DIRECT, ids=['buffered', 'direct'])
def flags(request):
    return request.param


@pytest.fixture
def fd(data_file, flags):
    fd = os.open(data_file, os.O_RDWR | flags)
    yield fd
    os.close(fd)


def outcome(function, *args):
    """What a call comes to: its value, or the kind of exception and its errno."""
    try:
        return function(*args)
    except OSError as error:
        return type(error), error.errno, error.strerror
    except Exception as error:
        return type(error)


# The same as os --------------------------------------------------------------------------------


@pytest.mark.parametrize('n, offset', [
    (4096, 0), (4096, MIB - 4096), (8192, MIB - 4096), (4096, MIB), (4096, 2 * MIB), (0, 0),
    (MIB, 0), (2 * MIB, 0)])
def test_pread_gives_the_bytes_that_are_there(fd, n, offset):
    assert greenaio.os.pread(fd, n, offset) == pattern(MIB)[offset:offset + n]


def test_pread_runs_as_native_aio_where_the_file_is_direct(fd, flags):
    before = _hub.get_driver().engine.submitted
    greenaio.os.pread(fd, 4096, 0)
    assert _hub.get_driver().engine.submitted - before == (1 if flags else 0)


def test_what_was_begun_and_is_done_waits_for_no_pass(data_file):
    with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)             # memory says here that it knows no RWF_NOWAIT
        buffers = [aligned_buffer(4096) for _ in range(2)]
        begun = [file.begin(True, buffer, 4096 * i) for i, buffer in enumerate(buffers)]
        if file.device == os.stat('/dev/shm').st_dev:       # a disk is not done yet
            assert len(_hub.get_driver().engine.ready) == 0
        assert [file.end(one) for one in begun] == [4096, 4096]
        assert b''.join(buffers) == pattern(8192)


def test_what_is_begun_with_more_to_come_goes_out_together(data_file):
    with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)
        engine = _hub.get_driver().engine
        for last in True, False:        # or who waits for it sends it
            before = engine.batches, engine.submitted
            buffers = [aligned_buffer(4096) for _ in range(8)]
            begun = [file.begin(True, buffer, 4096 * i, i < 7 or last) for i, buffer in enumerate(buffers)]
            assert [file.end(one) for one in begun] == [4096] * 8
            assert (engine.batches, engine.submitted) == (before[0] + 1, before[1] + 8)
            assert b''.join(buffers) == pattern(8 * 4096)


def test_what_is_begun_goes_out_though_nobody_waits_for_it(data_file):
    with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)
        gevent.sleep(0.001)             # now no pass is under way, which would send it at its end
        memory = aligned_buffer(4096)
        file.begin(True, memory, 8192, True)
        with gevent.Timeout(10):
            while bytes(memory) != pattern(12288)[8192:]:
                gevent.sleep(0.001)


def test_preadv_fills_buffers_in_order(fd):
    buffers = [aligned_buffer(4096), aligned_buffer(8192), aligned_buffer(4096)]
    assert greenaio.os.preadv(fd, buffers, 4096) == 16384
    assert b''.join(map(bytes, buffers)) == pattern(MIB)[4096:4096 + 16384]


def test_writes_land_where_they_should(fd):
    one = aligned_buffer(4096)
    one[:] = b'1' * 4096
    two = aligned_buffer(8192)
    two[:] = b'2' * 8192
    assert greenaio.os.pwrite(fd, one, 8192) == 4096
    assert greenaio.os.pwritev(fd, [two, one], 65536) == 12288
    greenaio.os.fsync(fd)
    want = bytearray(pattern(MIB))
    want[8192:12288] = one
    want[65536:65536 + 12288] = bytes(two) + bytes(one)
    assert greenaio.os.pread(fd, MIB, 0) == want


# A part of what was asked for --------------------------------------------------------------------

@pytest.fixture
def kernel(disk_folder, driver):
    """What native AIO of this thread goes to, and a file."""
    with open(os.path.join(disk_folder, 'data'), 'wb') as file:
        file.write(pattern(65536))
        os.fsync(file.fileno())
    before = _hub.use_driver(driver)
    yield driver.engine.context, file.name
    _hub.use_driver(before)


def answer(context, name, result, *, writing):
    """Move *result* bytes of the request that the kernel has, or say minus an errno. Return its offset and
    size."""
    with gevent.Timeout(10):
        while not context.taken:
            gevent.sleep(0.001)
    request, = context.taken
    parts = [(request['address'], request['nbytes'])]
    if request['opcode'] in (7, 8):     # vectors
        pairs = (ctypes.c_size_t * (2 * request['nbytes'])).from_address(request['address'])
        parts = list(zip(pairs[::2], pairs[1::2]))
    asked = request['offset'], sum(n for _, n in parts)
    result = asked[1] if result is None else result
    with open(name, 'r+b', 0) as file:
        at, left = request['offset'], max(result, 0)
        for address, n in parts:
            n = min(n, left)
            if writing:
                os.pwrite(file.fileno(), ctypes.string_at(address, n), at)
            else:
                ctypes.memmove(address, os.pread(file.fileno(), n, at), n)
            at, left = at + n, left - n
        os.fsync(file.fileno())
    assert request['flags'] & os.RWF_NOWAIT
    context.finish(request, result)
    return asked


@pytest.mark.parametrize('writing', [False, True], ids=['read', 'write'])
@pytest.mark.parametrize('count', [1, 3], ids=['one buffer', 'vectors'])
@pytest.mark.parametrize('answers', [[4096, None], [4096, 8192, None], [4096, -errno.EAGAIN], [0], [4096, 0]],
                         ids=['rest', 'twice', 'thread', 'nothing', 'then nothing'])
def test_part_that_nowait_brings_in_the_middle_of_a_file_is_made_whole(kernel, answers, count, writing):
    """btrfs answers so at the end of an extent. To a reader a short result is the end of the file."""
    context, name = kernel
    memory = aligned_buffer(32768)
    memory[:] = (b'w' if writing else b'?') * 32768
    sizes = [32768] if count == 1 else [2048, 14336, 16384]
    parts = [memory[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(count)]
    with File(name, os.O_RDWR | os.O_DIRECT) as file:
        moving = gevent.spawn(file.pwritev if writing else file.preadv, parts, 8192)
        done = 0
        for result in answers:
            asked = answer(context, name, result, writing=writing)
            assert asked == (8192 + done, 32768 - done)
            done += max(result or 0, 0)
        assert moving.get(timeout=10) == 32768
    want = b'w' * 32768 if writing else pattern(65536)[8192:8192 + 32768]
    with open(name, 'rb') as file:
        whole = file.read()
    assert memory == want and whole == (pattern(65536)[:8192] + want + pattern(65536)[8192 + 32768:])


def test_part_that_nowait_brings_at_the_end_of_a_file_is_all(kernel):
    context, name = kernel
    with File(name, os.O_RDONLY | os.O_DIRECT) as file:
        reading = gevent.spawn(file.pread, 32768, 65536 - 8192)
        answer(context, name, 8192, writing=False)
        assert reading.get(timeout=10) == pattern(65536)[-8192:]


@pytest.mark.parametrize('writing', [False, True], ids=['read', 'write'])
@pytest.mark.parametrize('answers', [[4096, None], [None], [-errno.EAGAIN], [4096, -errno.EOPNOTSUPP]],
                         ids=['rest', 'whole', 'thread', 'rest by a thread'])
def test_request_that_was_begun_is_made_whole_before_its_end_is_asked_for(kernel, writing, answers):
    context, name = kernel
    memory = aligned_buffer(32768)
    memory[:] = (b'w' if writing else b'?') * 32768
    with File(name, os.O_RDWR | os.O_DIRECT) as file:
        begun = file.begin(not writing, memory, 8192)
        for result in answers:
            answer(context, name, result, writing=writing)
        with gevent.Timeout(10):
            while begun[1].state != State.DONE:
                gevent.sleep(0.001)
        assert file.end(begun) == 32768
    with open(name, 'rb') as file:
        assert memory == file.read()[8192:40960] == (b'w' * 32768 if writing else pattern(65536)[8192:40960])


@pytest.mark.parametrize('answers', [
    [-errno.EAGAIN], [-errno.EOPNOTSUPP], [4096, 8192, -errno.EAGAIN], [None],
], ids=['waits', 'unsupported', 'parts', 'done'])
def test_greenlet_stays_parked_while_its_read_goes_from_way_to_way(kernel, answers):
    context, name = kernel
    memory = aligned_buffer(32768)
    switches = []
    with File(name, os.O_RDONLY | os.O_DIRECT) as file:
        reading = gevent.spawn(file.preadv, [memory], 0)
        settrace(lambda event, pair: switches.append(event) if reading in pair else None)
        try:
            for result in answers:
                answer(context, name, result, writing=False)
            assert reading.get(timeout=10) == 32768
        finally:
            settrace(None)
    assert switches == ['switch'] * 4   # it begins, parks, is resumed, and ends
    assert memory == pattern(65536)[:32768]


def test_read_whose_greenlet_was_killed_goes_no_other_way(kernel):
    context, name = kernel
    memory = aligned_buffer(32768)
    lent = _hub.get_driver().engine.by_thread
    file = File(name, os.O_RDONLY | os.O_DIRECT)
    reading = gevent.spawn(file.preadv, [memory], 0)
    gevent.sleep(0.01)
    reading.kill()
    answer(context, name, -errno.EAGAIN, writing=False)
    gevent.sleep(0.01)
    file.close()
    assert _hub.get_driver().engine.by_thread == lent
    assert bytes(memory) == bytes(32768)


def test_no_memory_for_the_next_way_is_an_error_of_that_read_alone(kernel):
    class Ways(_dispatch.Ways):
        def next_way(self, driver, request, result, asked):
            raise MemoryError

    context, _ = kernel
    requests = [Request(Opcode.PREAD, -1, bytearray(512), 512 * i) for i in range(2)]
    for request in requests:
        request.ask()
        request.file, request.may_move = Ways(), True
    greenlets = [gevent.spawn(_hub.get_driver().perform_request, request) for request in requests]
    gevent.sleep(0.01)
    context.finish(result=-errno.EAGAIN)
    context.finish()
    assert [greenlet.get(timeout=10) for greenlet in greenlets] == [-errno.ENOMEM, 512]


def test_failure_in_the_choice_of_a_way_is_reported_and_wakes_its_greenlet(kernel, monkeypatch):
    context, _ = kernel
    reported = []
    monkeypatch.setattr(gevent.get_hub(), 'handle_error', lambda context, kind, *rest: reported.append(kind))
    request = Request(Opcode.PREAD, -1, bytearray(512), 0)
    request.ask()
    request.may_move = True             # and its file knows no ways
    reading = gevent.spawn(_hub.get_driver().perform_request, request)
    gevent.sleep(0.01)
    context.finish(result=-errno.EAGAIN)
    assert reading.get(timeout=10) == -errno.EIO
    assert reported == [TypeError]


# The answer of os --------------------------------------------------------------------------------

@pytest.mark.parametrize('call, args', [
    ('pread', (-1, 10, 0)), ('pread', (9999, 10, 0)), ('pread', (None, -1, 0)),
    ('pread', (None, 10, -1)), ('pread', (None, 'x', 0)), ('pread', (None, 1.5, 0)),
    ('pread', (None, 512, 1 << 70)), ('pread', ('fd', 512, 0)),
    ('preadv', (None, [], 0)), ('preadv', (None, 7, 0)), ('preadv', (None, [b'x'], 0)),
    ('preadv', (None, [bytearray(1)] * 2000, 0)), ('preadv', (None, {}, 0)),
    ('preadv', (None, [bytearray(512)], 0, 1 << 20)), ('preadv', (9999, [bytearray(512)], 0)),
    ('pwrite', (None, 'text', 0)), ('pwrite', (9999, b'x', 0)), ('pwrite', (None, b'', 0)),
    ('pwrite', (None, memoryview(b'abcdef')[::2], 0)), ('pwritev', (None, [], 0)),
    ('pwritev', (None, [b''] * 2000, 0)), ('pwritev', (None, [b'x' * 512], -5)),
    ('pwrite', (None, b'x' * 4096, (1 << 63) - 4096)),
    ('fsync', (9999,)), ('fdatasync', (-1,)), ('fsync', ('x',)), ('close', (9999,)),
])
def test_bad_arguments_get_the_answer_of_os(fd, call, args):
    args = tuple(fd if arg is None else arg for arg in args)
    theirs, ours = (outcome(getattr(module, call), *args) for module in (os, greenaio.os))
    assert ours == theirs


@pytest.mark.parametrize('flag', ['RWF_DSYNC', 'RWF_SYNC', 'RWF_NOWAIT', 'RWF_APPEND', 'RWF_HIPRI'])
@pytest.mark.parametrize('call', ['preadv', 'pwritev'])
def test_flags_are_honoured_or_refused_as_by_os(fd, call, flag):
    value = getattr(os, flag, {'RWF_APPEND': 16}.get(flag))
    buffer = aligned_buffer(4096)
    theirs = outcome(getattr(os, call), fd, [buffer], 0, value)
    size = os.fstat(fd).st_size
    ours = outcome(getattr(greenaio.os, call), fd, [buffer], 0, value)
    if theirs != ours:
        # NOWAIT may be refused of a request that it was granted before: never anything else
        assert flag == 'RWF_NOWAIT'
        assert ours[1] in (errno.EAGAIN, errno.EOPNOTSUPP)
    if flag == 'RWF_APPEND' and call == 'pwritev' and theirs == 4096:
        assert os.fstat(fd).st_size == size + 4096


@pytest.mark.parametrize('make', [
    lambda folder: os.pipe(), lambda folder: (os.open('/dev/null', os.O_RDWR),),
    lambda folder: (os.open('/proc/self/status', os.O_RDONLY),),
    lambda folder: (os.open(folder, os.O_RDONLY),),
    lambda folder: (os.open(folder, os.O_PATH),),
    lambda folder: (os.memfd_create('x'),), lambda folder: (os.eventfd(0),),
    lambda folder: os.pipe2(os.O_DIRECT),
    lambda folder: tuple(s.detach() for s in socket.socketpair()),
], ids=['pipe', 'null', 'proc', 'directory', 'path', 'memfd', 'eventfd', 'packet pipe', 'socket'])
def test_what_is_no_file_gets_the_answer_of_os(folder, make):
    fds = make(folder)
    try:
        for call, args in [('pread', (100, 0)), ('preadv', ([bytearray(10)], 0)),
                           ('pwrite', (b'x', 0)), ('pwritev', ([b'x'], 0)), ('fsync', ()),
                           ('fdatasync', ())]:
            theirs, ours = (outcome(getattr(m, call), fds[0], *args) for m in (os, greenaio.os))
            if call == 'pread' and not isinstance(theirs, tuple):
                theirs, ours = theirs[:20], ours[:20]
            assert ours == theirs, call
    finally:
        for fd in fds:
            os.close(fd)


def test_read_only_file_refuses_to_be_written(data_file, flags):
    fd = os.open(data_file, os.O_RDONLY | flags)
    buffer = aligned_buffer(4096)
    assert outcome(greenaio.os.pwrite, fd, buffer, 0) == outcome(os.pwrite, fd, buffer, 0)
    os.close(fd)


def test_beyond_4_gib(disk_folder, flags):
    path = os.path.join(disk_folder, 'sparse')
    with File(path, os.O_RDWR | os.O_CREAT | flags) as file:
        buffer = aligned_buffer(4096)
        buffer[:] = b'z' * 4096
        offset = (5 << 30) + 4096
        assert file.pwrite(buffer, offset) == 4096
        assert file.pread(4096, offset) == bytes(buffer)
        assert file.pread(4096, 4 << 30) == bytes(4096)


# Cooperation -----------------------------------------------------------------------------------


def test_hub_goes_on_while_greenlets_read(data_file, flags):
    with File(data_file, os.O_RDONLY | flags) as file:
        ticks = []

        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0)

        ticker = gevent.spawn(tick)
        greenlets = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(256)]
        gevent.joinall(greenlets, raise_error=True)
        ticker.kill()
        assert b''.join(greenlet.value for greenlet in greenlets) == pattern(MIB)
        assert len(ticks) > 1


def test_called_in_the_hub_only_close_works(data_file, flags):
    fd = os.open(data_file, os.O_RDONLY | flags)
    file = File.from_fd(fd)
    caught = []

    def callback():
        for call in (lambda: file.pread(4096, 0), lambda: greenaio.os.preadv(fd, [aligned_buffer(512)], 0),
                     lambda: greenaio.os.fsync(fd), lambda: File(data_file)):
            try:
                call()
            except BlockingSwitchOutError as error:
                caught.append(error)
        file.close()
        greenaio.os.close(fd)

    gevent.get_hub().loop.run_callback(callback)
    gevent.sleep(0.01)
    assert len(caught) == 4
    with pytest.raises(OSError):
        os.fstat(fd)


def test_pool_of_the_hub_is_not_touched(data_file):
    run_python('''
        import gevent, os, sys, greenaio.os
        fd = os.open(sys.argv[1], os.O_RDONLY)
        assert len(greenaio.os.pread(fd, 100, 0)) == 100
        assert gevent.get_hub()._threadpool is None
    ''', data_file)


# What the kernel may still write ----------------------------------------------------------------


def until_asked(count):
    """Wait until all have begun, however slow the machine."""
    with gevent.Timeout(60):
        while len(_hub.get_driver().engine.requests()) < count:
            gevent.sleep(0.001)


def test_killed_in_flight_on_a_held_disk_keeps_the_buffer(held_disk):
    """Kill 64 readers, drop everything, allocate the same sizes, release the disk: nothing is hurt."""
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        held_disk.hold()
        driver = _hub.get_driver()
        abandoned_before = len(driver.engine.in_flight)
        greenlets = [gevent.spawn(file.preadv, [aligned_buffer(4096)], i * 4096) for i in range(64)]
        greenlets += [gevent.spawn(file.pread, 4096, i * 4096) for i in range(64)]
        until_asked(128 + abandoned_before)
        assert len(driver.engine.in_flight) - abandoned_before > 100
        gevent.killall(greenlets, timeout=5)
        assert all(greenlet.ready() for greenlet in greenlets)
        del greenlets
        gc.collect()
        fresh = [aligned_buffer(4096) for _ in range(256)]
        for buffer in fresh:
            buffer[:] = b'\xee' * 4096
        held_disk.release()
        for _ in range(1000):
            if not len(driver.engine.in_flight):
                break
            gevent.sleep(0.01)
        assert all(bytes(buffer) == b'\xee' * 4096 for buffer in fresh)


def test_held_disk_stops_nobody_else(held_disk):
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        held_disk.hold()
        greenlets = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(200)]
        gaps = []
        for _ in range(50):
            gaps.append(1)
            gevent.sleep(0.001)
        assert sum(greenlet.ready() for greenlet in greenlets) < 100
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
            file.pread(4096, 0)
        held_disk.release()
        gevent.joinall(greenlets, timeout=30, raise_error=True)
        assert greenlets[7].value == pattern(4 * MIB)[7 * 4096:8 * 4096]


def test_closed_while_in_flight_harms_no_request(held_disk):
    """The fd is closed and its number reused, both for what is in flight and for what is queued."""
    fd = os.open(held_disk.file, os.O_RDONLY | os.O_DIRECT)
    file = File.from_fd(fd, closefd=True)
    held_disk.hold()
    depth = _hub.get_driver().engine.depth
    greenlets = [gevent.spawn(file.pread, 4096, (i % 1024) * 4096) for i in range(depth + 50)]
    until_asked(depth + 50)
    file.close()
    with pytest.raises(ValueError):
        file.pread(4096, 0)
    with pytest.raises(OSError) as caught:
        greenaio.os.pread(fd, 4096, 0)
    assert caught.value.errno == errno.EBADF
    others = [os.open('/dev/zero', os.O_RDONLY) for _ in range(3)]
    assert fd not in others
    held_disk.release()
    gevent.joinall(greenlets, timeout=30, raise_error=True)
    want = pattern(4 * MIB)
    for i, greenlet in enumerate(greenlets):
        assert greenlet.value == want[(i % 1024) * 4096:(i % 1024 + 1) * 4096]
    gevent.sleep(0.01)
    with pytest.raises(OSError):
        os.fstat(fd)
    for other in others:
        os.close(other)


def test_closed_while_queued_for_a_thread_reads_the_right_file(data_file):
    fd = os.open(data_file, os.O_RDONLY)
    greenlets = [gevent.spawn(greenaio.os.pread, fd, 4096, i * 4096) for i in range(60)]
    gevent.sleep(0)
    greenaio.os.close(fd)
    others = [os.open('/dev/zero', os.O_RDONLY) for _ in range(3)]
    gevent.joinall(greenlets, raise_error=True)
    assert b''.join(greenlet.value for greenlet in greenlets) == pattern(MIB)[:60 * 4096]
    for other in others:
        os.close(other)
    assert len(_hub.get_driver().engine.lent) == 0


def test_closing_submits_what_is_queued_first(data_file):
    """Requests wait for the end of the hub's turn; the fd is closed before that comes."""
    files = [os.open(data_file, os.O_RDONLY | os.O_DIRECT) for _ in range(2)]
    greenlets = [gevent.spawn(greenaio.os.pread, files[i % 2], 4096, i * 4096) for i in range(100)]

    def close():
        greenaio.os.close(files[0])
        greenaio.os.close(files[1])

    gevent.spawn(close)
    gevent.joinall(greenlets, raise_error=True)
    assert b''.join(greenlet.value for greenlet in greenlets) == pattern(MIB)[:100 * 4096]


@pytest.mark.parametrize('reading', [True, False])
def test_memory_with_no_owner_gets_a_bounce_buffer(fd, flags, reading):
    """io.BufferedReader hands out a memoryview of its own memory, which pins nothing."""
    import ctypes
    memory = aligned_buffer(4096)
    memory[:] = b'w' * 4096
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    make = ctypes.pythonapi.PyMemoryView_FromMemory
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    ownerless = make(address, 4096, 0x200)
    assert ownerless.obj is None
    if reading:
        other = aligned_buffer(4096)
        assert greenaio.os.preadv(fd, [other, ownerless], 4096) == 8192
        assert bytes(other) + bytes(memory) == pattern(MIB)[4096:12288]
        assert greenaio.os.preadv(fd, [ownerless], MIB - 4096) == 4096
        assert bytes(memory) == pattern(MIB)[-4096:]
    else:
        assert greenaio.os.pwritev(fd, [ownerless], 4096) == 4096
        assert greenaio.os.pread(fd, 4096, 4096) == b'w' * 4096


def test_buffered_reader_over_a_raw_file_of_ours(data_file):
    class Raw(io.RawIOBase):
        def __init__(self, file):
            self.file, self.position = file, 0

        def readable(self):
            return True

        def readinto(self, buffer):
            n = self.file.preadv([buffer], self.position)
            self.position += n
            return n

    with File(data_file) as file:
        assert io.BufferedReader(Raw(file)).read() == pattern(MIB)


# The file itself --------------------------------------------------------------------------------


def test_file_remembers_what_it_is(data_file, flags):
    import stat
    with File(data_file, os.O_RDONLY | flags) as file:
        assert file.direct == bool(flags)
        assert file.kind == stat.S_IFREG
        assert file.device == os.stat(data_file).st_dev
        assert file.name == data_file
        assert file.alignment == 1 if not flags else file.alignment in (512, 4096)
        assert os.fstat(file.fileno()).st_ino == os.stat(data_file).st_ino
        assert not os.get_inheritable(file.fileno())


def test_error_names_the_file(data_file, flags):
    with File(data_file, os.O_RDONLY | flags) as file:
        with pytest.raises(OSError) as caught:
            file.pwrite(aligned_buffer(4096), 0)
        assert caught.value.filename == data_file
        assert caught.value.errno == errno.EBADF
    with pytest.raises(FileNotFoundError) as caught:
        File('/no/such/file')
    assert caught.value.filename == '/no/such/file'
    with pytest.raises(ValueError, match='closed'):
        file.pread(1, 0)
    file.close()
    assert file.closed


def test_forgotten_file_warns_and_is_closed(data_file):
    file = File(data_file)
    fd = file.fileno()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        del file
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning]
    assert data_file in str(caught[0].message)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_borrowed_fd_stays_open(data_file):
    fd = os.open(data_file, os.O_RDONLY)
    with File.from_fd(fd) as file:
        assert file.pread(8, 8) == pattern(16)[8:]
    os.fstat(fd)
    with File.from_fd(fd, closefd=True):
        pass
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(OSError):
        File.from_fd(fd)


@pytest.mark.parametrize('max_batch', [0, 33, -1])
def test_max_batch_has_bounds(data_file, max_batch):
    with pytest.raises(ValueError, match='max_batch'):
        File(data_file, max_batch=max_batch)


def test_sync_takes_native_aio_where_there_is_a_disk(data_file):
    with File(data_file, os.O_RDWR) as file:
        before = _hub.get_driver().engine.submitted
        file.fsync()
        file.fdatasync()
        greenaio.os.fdatasync(file)
        assert _hub.get_driver().engine.submitted - before == (0 if '/dev/shm' in data_file else 3)


# Limits and failures ------------------------------------------------------------------------------


def test_full_file_system_is_a_short_write_then_enospc(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    import subprocess
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=512k', 'none', tmp_path], check=True)
    try:
        with File(tmp_path / 'file', os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
            assert file.pwrite(aligned_buffer(4 * MIB), 0) == 512 * 1024
            with pytest.raises(OSError) as caught:
                file.pwrite(aligned_buffer(4096), 512 * 1024)
            assert caught.value.errno == errno.ENOSPC
    finally:
        subprocess.run(['umount', tmp_path], check=True)


def test_size_limit_is_a_short_write_then_efbig(disk_folder):
    run_python('''
        import resource, signal, sys, os, errno
        from greenaio import File, aligned_buffer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with File(sys.argv[1] + '/limited', os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
            assert file.pwrite(aligned_buffer(65536), 0) == 8192
            try:
                file.pwrite(aligned_buffer(4096), 8192)
            except OSError as error:
                assert error.errno == errno.EFBIG, error
            else:
                raise AssertionError
    ''', disk_folder)


SECCOMP = '''
import ctypes, errno, os, struct, sys
def deny(number, code):
    """A seccomp filter: system call *number* gives *code*, all others go through."""
    filters = b''.join(struct.pack('HBBI', *f) for f in [
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7fff0000)])
    memory = ctypes.create_string_buffer(filters)
    program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4, ctypes.addressof(memory)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0
'''
# What a sandbox may deny, because its list of calls is older than they are.
NEWER_CALLS = {name: numbers[os.uname().machine != 'x86_64'] for name, numbers in {
    'io_setup': (206, 0), 'io_submit': (209, 2), 'openat2': (437, 437), 'cachestat': (451, 451),
    'statmount': (457, 457), 'statx': (332, 291), 'preadv2': (327, 286), 'pwritev2': (328, 287),
    'eventfd2': (290, 19), 'copy_file_range': (326, 285), 'renameat2': (316, 276), 'preadv': (295, 69),
    'pwritev': (296, 70), 'sched_setaffinity': (203, 122), 'umask': (95, 166), 'memfd_create': (319, 279),
    'readahead': (187, 213), 'sync_file_range': (277, 84)}.items()}
IO_SETUP, IO_SUBMIT = NEWER_CALLS['io_setup'], NEWER_CALLS['io_submit']


@pytest.mark.parametrize('code', ['EPERM', 'ENOSYS', 'EAGAIN', 'ENOMEM'])
def test_refused_setup_gives_the_same_results_by_threads_and_one_warning(data_file, code):
    done = run_python(SECCOMP + f'''
deny({IO_SETUP}, errno.{code})
import logging
logging.basicConfig()           # silent without
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
with File(sys.argv[1], os.O_RDWR | os.O_DIRECT) as file:
    for turn in range(3):
        assert len(file.pread(4096, 4096)) == 4096
        assert file.pwrite(aligned_buffer(4096), 0) == 4096
        file.fdatasync()
    assert not _hub.get_driver().native
''', data_file, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('native AIO') == 1 and 'aio-max-nr' in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('code', ['EPERM', 'ENOSYS', 'EAGAIN'])
def test_refused_submit_asks_a_thread(data_file, code):
    run_python(SECCOMP + f'''
deny({IO_SUBMIT}, errno.{code})
from greenaio import File, aligned_buffer
with File(sys.argv[1], os.O_RDWR | os.O_DIRECT) as file:
    assert file.pread(4096, 8192)[:8] == (1024).to_bytes(8, 'little')
    assert file.pwrite(aligned_buffer(4096), 0) == 4096
    file.fsync()
''', data_file)


def test_no_descriptor_for_the_eventfd_is_a_clear_error(data_file):
    run_python('''
        import os, resource, sys, errno
        import gevent, greenaio.os
        gevent.sleep(0)
        fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, hard))
        try:
            greenaio.os.pread(fd, 4096, 0)
        except OSError as error:
            assert error.errno == errno.EMFILE
        else:
            raise AssertionError
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(greenaio.os.pread(fd, 4096, 0)) == 4096
    ''', data_file)


def test_signals_disturb_nothing(data_file):
    run_python('''
        import signal, sys, os, gevent
        from greenaio import File
        count = [0]
        signal.signal(signal.SIGALRM, lambda *a: count.__setitem__(0, count[0] + 1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with File(sys.argv[1], os.O_RDONLY | os.O_DIRECT) as file:
            def work(n):
                for i in range(300):
                    at = (n * 31 + i) % 256 * 4096
                    assert file.pread(4096, at)[:8] == (at // 8).to_bytes(8, 'little')
            gevent.joinall([gevent.spawn(work, n) for n in range(32)], raise_error=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
    ''', data_file)


DENIED = {'statx': 332, 'preadv2': 327, 'pwritev2': 328} if os.uname().machine == 'x86_64' else \
    {'statx': 291, 'preadv2': 286, 'pwritev2': 287}


@pytest.mark.parametrize('code', ['ENOSYS', 'EPERM'])
@pytest.mark.parametrize('call', DENIED)
def test_sandbox_that_denies_a_newer_call_changes_no_result(folder, call, code):
    run_python(SECCOMP + f'''
deny({DENIED[call]}, errno.{code})
import gevent, greenaio, greenaio.os
os.chdir(sys.argv[1])
for direct in False, True:
    with greenaio.open('file', 'wb', direct=direct) as file:
        file.write(b'x' * 9000)
    with greenaio.open('file', 'rb', direct=direct) as file:
        assert file.read() == b'x' * 9000
fd = greenaio.os.open('file', os.O_RDWR)
assert greenaio.os.pread(fd, 100, 8950) == b'x' * 50
assert greenaio.os.pwritev(fd, [b'yy', b'zz'], 9000) == 4
buffers = [bytearray(3), bytearray(3)]
assert greenaio.os.preadv(fd, buffers, 8999) == 5 and buffers == [b'xyy', b'zz\\0']
assert greenaio.os.read(fd, 2) == b'xx' and greenaio.os.write(fd, b'w') == 1
assert greenaio.os.stat('file').st_size == greenaio.os.fstat(fd).st_size == 9004
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
assert greenaio.os.pread(fd, 3, 0) == b'xxw'
assert greenaio.copyfile('file', 'copy') and os.path.getsize('copy') == 9004
greenaio.os.close(fd)
''', folder)
