"""The kernel with no gevent: a context, its ring, its eventfd."""

import errno
import faulthandler
import os
import select
import textwrap
import time

import pytest
from test_file import NEWER_CALLS, SECCOMP

import greenaio
from greenaio import aligned_buffer
from greenaio._core.context import Context, Opcode
from greenaio._core.engine import Engine
from greenaio._core.request import Request
from tests.support.processes import contexts, run_python


@pytest.fixture
def context():
    context = Context()
    context.open(16)
    yield context
    context.close()


def wait_for(engine, count):
    end = time.monotonic() + 10
    while len(engine.ready) < count:
        assert time.monotonic() < end
        engine.reap()


def test_context_is_a_depth_and_an_eventfd(context):
    assert context.depth == 16
    assert context.is_open and context.reads_ring
    assert not os.get_inheritable(context.eventfd)
    with pytest.raises(BlockingIOError):
        os.read(context.eventfd, 8)


def test_closing_leaves_no_fd_and_no_context():
    before = contexts()
    context = Context()
    fd = context.eventfd
    context.open(100)
    assert contexts() == before + 1
    context.close()
    context.close()
    assert contexts() == before
    with pytest.raises(OSError):
        os.fstat(fd)


def test_eventfd_failing_leaves_nothing():
    run_python('''
        import os, resource, errno
        from greenaio._core.context import Context
        before = open('/proc/sys/fs/aio-nr').read()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            Context()
        except OSError as error:
            assert error.errno == errno.EMFILE, error
        else:
            raise AssertionError('no error')
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open('/proc/sys/fs/aio-nr').read() == before
    ''')


def test_pipe_stands_for_an_eventfd_that_a_sandbox_denies():
    """It has two numbers as well, a forked child has one of its own, and native AIO is refused with it."""
    run_python(SECCOMP + f"deny({NEWER_CALLS['eventfd2']}, errno.EPERM)\n" + textwrap.dedent('''
        import select
        from greenaio._core.context import Context
        before = os.listdir('/proc/self/fd')
        context = Context()
        def is_signalled():
            return bool(select.select([context.eventfd], [], [], 0)[0])
        def clear():
            for _ in range(2000):
                if not is_signalled():
                    return
                context.clear()
        for _ in range(100_000):                # more than a pipe holds
            context.signal()
        assert is_signalled()
        clear()
        assert not is_signalled() and context.denied == -errno.EPERM
        try:
            context.open(16)
        except PermissionError as error:
            assert 'eventfd' in str(error) and not context.is_open
        else:
            raise AssertionError('native AIO that could tell nothing')
        pid = os.fork()
        if pid == 0:
            context.after_fork_in_child()
            context.signal()
            os._exit(not is_signalled())
        assert os.waitpid(pid, 0)[1] == 0 and not is_signalled()
        os.close(context.own_eventfd)
        context.signal()
        assert is_signalled()
        clear()
        assert not is_signalled()
        context.close()
        assert os.listdir('/proc/self/fd') == before
    '''))


def test_setup_failing_leaves_a_context_that_can_be_closed():
    with open('/proc/sys/fs/aio-max-nr') as file:
        too_many = int(file.read()) + 1
    context = Context()
    with pytest.raises(BlockingIOError, match='io_setup') as caught:
        context.open(too_many)
    assert caught.value.errno == errno.EAGAIN
    assert not context.is_open
    context.open(16)                # and used again
    context.close()


@pytest.mark.parametrize('reads_ring', [True, False])
def test_ring_wraps_around(data_file, reads_ring):
    """More completions than the ring has slots, read from user space and by io_getevents."""
    engine = Engine(Context(), depth=16)
    engine.context.open(16)
    if not reads_ring:
        engine.context.read_by_syscall()
    memory = [aligned_buffer(4096) for _ in range(16)]
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    try:
        for turn in range(60):      # io_setup(16) makes a ring of 127
            requests = [Request(Opcode.PREAD, fd, memory[i], ((turn * 16 + i) % 256) * 4096)
                        for i in range(16)]
            for request in requests:
                engine.enqueue(request)
            engine.flush()
            wait_for(engine, 16 * (turn + 1))
            for i, request in enumerate(requests):
                assert request.result == 4096
                assert bytes(memory[i][:8]) == (request.offset // 8).to_bytes(8, 'little')
            engine._check()
        assert engine.completed == 960
    finally:
        os.close(fd)
        engine.context.close()


def test_what_was_peeked_is_not_given_back_before_it_is_committed(data_file, context):
    engine = Engine(context, depth=16)
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    for i in range(4):
        engine.enqueue(Request(Opcode.PREAD, fd, aligned_buffer(4096), i * 4096))
    engine.flush()
    while context.peek() < 4:
        time.sleep(0.001)
    assert context.peek() == 4
    context.commit(1)               # the slots of three are ours still
    assert context.peek() == 3
    context.commit(3)
    assert context.peek() == 0
    os.close(fd)


def test_completion_signals_the_eventfd(context, data_file):
    engine = Engine(context, depth=16)
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    engine.enqueue(Request(Opcode.PREAD, fd, aligned_buffer(4096), 0))
    engine.flush()
    assert select.select([context.eventfd], [], [], 10)[0]
    context.clear()
    assert not select.select([context.eventfd], [], [], 0)[0]
    assert engine.reap() == 1
    context.clear()                 # nothing signalled: no harm
    os.close(fd)


def test_spin_sees_a_completion_and_gives_up_without_one(context, data_file):
    assert context.spin(1000) == 0
    engine = Engine(context, depth=16)
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    engine.enqueue(Request(Opcode.PREAD, fd, aligned_buffer(4096), 0))
    engine.flush()
    assert context.spin(10_000_000_000) == 1
    assert engine.reap() == 1
    os.close(fd)


def test_misaligned_direct_read_is_an_event_with_einval(disk_folder, context):
    path = os.path.join(disk_folder, 'file')
    with open(path, 'wb') as file:
        file.write(bytes(8192))
    engine = Engine(context, depth=16)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    request = Request(Opcode.PREAD, fd, aligned_buffer(4096), 1)
    engine.enqueue(request)
    engine.flush()
    wait_for(engine, 1)
    assert request.result == -errno.EINVAL and engine.submitted == 1
    os.close(fd)


def test_bad_fd_fails_alone(data_file, context):
    engine = Engine(context, depth=16)
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    memory = aligned_buffer(4096)
    requests = [Request(Opcode.PREAD, number, memory, 0) for number in (fd, 9999, fd, 9998, fd)]
    for request in requests:
        engine.enqueue(request)
    engine.flush()
    wait_for(engine, 5)
    assert [request.result for request in requests] == [4096, -errno.EBADF, 4096, -errno.EBADF, 4096]
    os.close(fd)


def test_fdsync_probe_finds_it_and_reaps_its_own_event():
    run_python('''
        import select
        from greenaio._core.context import Context, Opcode
        context = Context()
        assert not context.supports(Opcode.FDSYNC)      # nobody asked the kernel yet
        context.open(16)
        assert context.supports(Opcode.FDSYNC)
        assert context.peek() == 0
        assert not select.select([context.eventfd], [], [], 0)[0]
        context.close()
    ''')


def test_fdsync_probe_survives_a_setup_that_fails():
    run_python('''
        from greenaio._core.context import Context, Opcode
        context = Context()
        try:
            context.open(int(open('/proc/sys/fs/aio-max-nr').read()) + 1)
        except BlockingIOError:
            pass
        assert not context.supports(Opcode.FDSYNC)
        context.open(16)
        assert context.supports(Opcode.FDSYNC)
        context.close()
    ''')


def test_unknown_opcode_is_not_supported(context):
    assert not context.supports(42)
    assert context.supports(Opcode.PREADV)


@pytest.mark.parametrize('depth', [0, -1])
def test_depth_is_positive(depth):
    with pytest.raises(ValueError, match='depth'):
        Context().open(depth)


def test_batch_has_a_bound(context):
    for _ in range(32):
        context.stage(1, Opcode.PREAD, 9999, 0, 0, 0, 0)
    with pytest.raises(ValueError, match='32'):
        context.stage(1, Opcode.PREAD, 9999, 0, 0, 0, 0)
    assert context.submit() == -errno.EBADF
    assert context.staged == 0


def test_child_does_not_inherit_the_ring(context):
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        context.peek()                  # SIGSEGV: the ring is not mapped
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)


def test_engine_and_below_run_without_gevent():
    run_python(f'''
        import sys, types
        house = types.ModuleType('greenaio')
        house.__path__ = {greenaio.__path__!r}
        sys.modules['greenaio'] = house
        sys.modules['gevent'] = sys.modules['greenlet'] = None     # importing them raises
        import os
        from greenaio._core.context import Context, Opcode
        from greenaio._core.engine import Engine
        from greenaio._core.request import Request
        from greenaio._core.memory import aligned_buffer
        engine = Engine(Context(), 16)
        engine.context.open(16)
        fd = os.memfd_create('x')
        os.write(fd, b'hello')
        request = Request(Opcode.PREAD, fd, aligned_buffer(16), 0)
        engine.enqueue(request)
        engine.flush()
        while not engine.reap():
            pass
        assert request.result == 5
        engine.context.close()
    ''')
