"""Interleavings that once went wrong, each drawn as a table."""

import os
import pathlib

import gevent
import pytest

import greenaio.os
from greenaio import File, aligned_buffer
from tests.support import missing
from tests.support.disks import pattern
from tests.support.processes import run_program, run_python


def test_refused_request_never_reaches_a_file_that_took_over_the_number(folder, data_file):
    """
        writer                       closer                     kernel
        pwrite: pending
                                     close: flushes             EBADF: not open for writing
                                     number must stay taken
        a thread is asked: EBADF
                                     opens a victim: not the same number before that
    """
    victim = pathlib.Path(folder, 'victim')
    victim.write_bytes(b'v' * 4096)
    background = File(data_file, os.O_RDONLY | os.O_DIRECT)
    file = File(data_file, os.O_RDONLY | os.O_DIRECT)
    results, opened = [], []

    def writer():
        try:
            results.append(file.pwrite(aligned_buffer(4096), 0))
        except OSError as error:
            results.append(error.errno)

    def closer():
        file.close()
        opened.append(os.open(victim, os.O_RDWR))

    greenlets = [gevent.spawn(background.pread, 131072, 0) for _ in range(60)]
    gevent.joinall([*greenlets, gevent.spawn(writer), gevent.spawn(closer)], raise_error=True)
    assert results == [9]
    assert victim.read_bytes() == b'v' * 4096
    background.close()
    os.close(opened[0])


def test_open_whose_greenlet_is_gone_leaks_no_fd(folder):
    """
        greenlet             worker
        File(fifo), parked   open(2) waits for a writer
        Timeout
                             open(2) returns: nobody is there to take the fd
    """
    path = os.path.join(folder, 'fifo')
    os.mkfifo(path)
    for _ in range(3):
        with gevent.Timeout(0.05, False):
            File(path)
    writer = os.open(path, os.O_WRONLY)
    gevent.sleep(0.1)
    mine = [fd for fd in os.listdir('/proc/self/fd')
            if os.path.realpath(f'/proc/self/fd/{fd}') == os.path.realpath(path)]
    assert mine == [str(writer)]
    os.close(writer)


def test_forgotten_file_is_closed_where_warnings_are_errors(data_file):
    done = run_python('''
        import os, sys, warnings
        from greenaio import File
        warnings.simplefilter('error')
        fd = File(sys.argv[1]).fileno()
        try:
            os.fstat(fd)
        except OSError:
            print('closed')
    ''', data_file, check=False)
    assert done.stdout == 'closed\n'


def test_handler_that_switches_while_the_driver_is_made_leaves_one_driver(data_file):
    """
        G1                                   G2
        makes a driver, warns, handler parks
                                             makes a driver, reads
        goes on: the second one stays
    """
    done = run_python('''
        import gevent, greenaio, logging, os, sys
        greenaio.config.depth = 65536       # more than there is: a warning
        logged = []
        class Handler(logging.Handler):
            def handle(self, record):       # not emit(): that one is called under a lock
                logged.append(record)
                gevent.sleep(0)
        logging.getLogger('greenaio').addHandler(Handler())
        file = greenaio.File.from_fd(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT))
        def work():
            for i in range(200):
                assert len(file.pread(4096, i % 256 * 4096)) == 4096
        greenlets = [gevent.spawn(work) for _ in range(4)]
        gevent.joinall(greenlets, timeout=20, raise_error=True)
        assert all(greenlet.successful() for greenlet in greenlets)
        print(len(logged))
    ''', data_file)
    if done.stdout == '0\n':
        missing('aio-max-nr is so large that no warning came')


THREADS = '''
import gevent, os, sys, threading, time, warnings
from greenaio import File
from greenaio._core import hub as _hub
warnings.simplefilter('ignore', DeprecationWarning)
path, ready, ios = sys.argv[1], [], [0]
def thread():
    file = File(path, os.O_RDONLY | os.O_DIRECT)
    while True:
        file.pread(4096, 0)
        ios[0] += 1
        ready.append(threading.get_ident())
        gevent.sleep(0.001)
'''


def test_child_of_a_thread_without_driver_keeps_its_own_context(data_file):
    """
        child's thread                           what Python ends first
                                                 another thread's locals: its driver is closed
        io_setup gives the very same address
                                                 io_destroy of the stale one: ours is gone
    """
    run_python(THREADS + '''
for i in range(4):
    threading.Thread(target=thread, daemon=True).start()
    while len(set(ready)) <= i:     # one by one: gevent on libuv crashes when hubs are made at the same time
        time.sleep(0.01)
file = File.from_fd(os.open(path, os.O_RDONLY | os.O_DIRECT))
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        file.pread(4096, 0)
        time.sleep(0.1)
        for _ in range(50):
            file.pread(4096, 0)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
sys.stdout.flush()
os._exit(0)
''', data_file)


def test_fork_leaves_the_other_threads_of_the_parent_their_wake_ups(data_file):
    """Closing their watchers in the child took the eventfd out of the epoll set that both share (libuv)."""
    run_python(THREADS + '''
threading.Thread(target=thread, daemon=True).start()
while len(ready) < 8:
    time.sleep(0.01)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    before, end = ios[0], time.monotonic() + 20
    while ios[0] < before + 10:
        assert time.monotonic() < end, 'the thread hangs'
        time.sleep(0.01)
os._exit(0)
''', data_file)


def test_child_that_python_hears_nothing_of_and_that_only_sleeps(data_file):
    run_python('''
        import ctypes, gevent, os, sys
        from greenaio import File
        file = File.from_fd(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT))
        file.pread(4096, 0)
        greenlets = [gevent.spawn(file.pread, 262144, 0) for _ in range(60)]
        gevent.sleep(0)
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            gevent.get_hub().exception_stream = None
            gevent.sleep(0.1)           # the ring is not mapped here: to look at it is to crash
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        gevent.joinall(greenlets, timeout=20, raise_error=True)
        assert all(greenlet.successful() for greenlet in greenlets)
    ''', data_file)


def test_fork_hook_that_comes_before_ours_may_do_io(data_file):
    """Ours runs second, and must not cancel what the child itself has in flight by then."""
    run_python('''
        import os, sys
        state = {}
        def hook():
            import gevent
            gevent.reinit()
            state['greenlets'] = [gevent.spawn(state['file'].pread, 262144, 0) for _ in range(40)]
            state['file'].pread(4096, 0)
        os.register_at_fork(after_in_child=hook)
        import gevent
        from greenaio import File
        file = state['file'] = File.from_fd(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT))
        file.pread(4096, 0)
        pid = os.fork()
        if pid == 0:
            gevent.joinall(state['greenlets'], timeout=20)
            os._exit(0 if all(greenlet.successful() for greenlet in state['greenlets']) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    ''', data_file)


@pytest.mark.parametrize('calls', [300])
def test_close_while_other_threads_make_and_lose_drivers(data_file, calls):
    import threading

    from greenaio._core import hub as _hub
    stop = []

    def make_and_lose():
        _hub.get_driver()
        gevent.get_hub().destroy(True)

    def churn():
        while not stop:
            thread = threading.Thread(target=make_and_lose)
            thread.start()
            thread.join()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(calls):
            greenaio.os.close(os.open(data_file, os.O_RDONLY))
    finally:
        stop.append(1)
        thread.join()


@pytest.mark.parametrize('number', ['eventfd', 'own_eventfd'])
@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_eventfd_closed_by_mistake_stops_nothing(disk_folder, number, loop):
    """In flight at that moment, with a thread, and later; and its number means another file meanwhile."""
    path = os.path.join(disk_folder, 'data')
    with open(path, 'wb') as file:
        file.write(pattern(1 << 20))
        os.fsync(file.fileno())
    run_program('closed_eventfd', path, number, env={'GEVENT_LOOP': loop, 'PYTHONWARNINGS': 'ignore'})
