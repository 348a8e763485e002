"""The N-th system call or allocation of each operation fails, for every N."""

import ctypes
import gc
import logging
import os
import sys
import threading
import traceback

import gevent

import greenaio
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub

path, which, code, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sweep = ctypes.CDLL(os.environ['LD_PRELOAD'])
MEMORY = 2
if which == MEMORY:
    sweep.sweep_install()
with open(path, 'rb') as file:
    content = file.read()
N = 4096
other = path + '-other'
hub = gevent.get_hub()
hub.exception_stream = None             # what fails in a callback is reported there; that is all it may do
sys.unraisablehook = lambda what: None
logging.getLogger('greenaio').addHandler(logging.NullHandler())     # that AIO is denied is said aloud


def evict(fd):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(flags):
    with File(path, os.O_RDONLY | flags) as file:
        if not flags:
            evict(file.fileno())
        assert file.pread(N, N) == content[N:2 * N]
        assert file.pread(N, N) == content[N:2 * N]


def read_vectored(flags):
    with File(path, os.O_RDONLY | flags) as file:
        buffers = [aligned_buffer(N), aligned_buffer(N)]
        n = file.preadv(buffers, 2 * N)
        assert b''.join(map(bytes, buffers))[:n] == content[2 * N:2 * N + n] and n in (N, 2 * N)


def read_misaligned():
    with File(path, os.O_RDONLY | os.O_DIRECT) as file:
        assert file.pread(1000, 77) == content[77:1077]
        memory = bytearray(1000)
        assert file.preadv([memory], 77) == 1000 and memory == content[77:1077]


def write_all(flags, data, at):
    with File(other, os.O_RDWR | os.O_CREAT | flags) as file:
        memory = aligned_buffer(len(data))
        memory[:] = data
        assert file.pwrite(memory, at) == len(data)
        file.fdatasync()
        file.fsync()
    with open(other, 'rb') as file:
        file.seek(at)
        assert file.read(len(data)) == data


def together():
    with File(path, os.O_RDONLY | os.O_DIRECT) as file:
        jobs = [gevent.spawn(file.pread, N, i * N) for i in range(40)]
        gevent.joinall(jobs)
        for i, job in enumerate(jobs):
            whole = content[i * N:(i + 1) * N]
            assert job.value == whole or isinstance(job.exception, (OSError, MemoryError))
        for job in jobs:
            job.get()


def killed(flags):
    with File(path, os.O_RDONLY | flags) as file:
        if not flags:
            evict(file.fileno())
        job = gevent.spawn(file.pread, N, 0)
        gevent.sleep(0)
        job.kill()


def calls():
    fd = greenaio.os.open(other, os.O_RDWR | os.O_CREAT)
    try:
        greenaio.os.ftruncate(fd, 100)
        assert greenaio.os.fstat(fd).st_size == 100 == greenaio.os.stat(other).st_size
        assert greenaio.os.write(fd, b'hello') == 5
        assert os.lseek(fd, 0, os.SEEK_SET) == 0
        assert greenaio.os.read(fd, 5) == b'hello'
    finally:
        try:
            greenaio.os.close(fd)
        except MemoryError:             # then it is open still
            os.close(fd)
            raise


def streams():
    with greenaio.open(other, 'wb') as file:
        file.write(content)
    with greenaio.open(other, 'rb', prefetch=4) as file:
        assert file.read() == content


def text():
    with greenaio.open(other, 'w') as file:
        file.write('one\ntwo\n')
    with greenaio.open(other) as file:
        assert list(file) == ['one\n', 'two\n']


def copied():
    greenaio.copyfile(path, other)
    with open(other, 'rb') as file:
        assert file.read() == content


def new_hub():
    caught = []

    def work():
        try:
            read_all(os.O_DIRECT)
        except (OSError, MemoryError, RuntimeError) as error:
            caught.append(error)
        finally:
            sweep.sweep_pause()         # a hub that has no memory to end with is gevent's matter
            gevent.get_hub().destroy(True)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def child():
    pid = os.fork()
    if pid == 0:
        try:
            gevent.reinit()
            read_all(os.O_DIRECT)
            os._exit(0)
        except (OSError, MemoryError, RuntimeError):
            os._exit(3)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 3), status
    if status == 3:
        raise MemoryError('in the child')


operations = {
    'direct read': lambda: read_all(os.O_DIRECT),
    'buffered read': lambda: read_all(0),
    'vectored direct read': lambda: read_vectored(os.O_DIRECT),
    'vectored buffered read': lambda: read_vectored(0),
    'misaligned read': read_misaligned,
    'direct write': lambda: write_all(os.O_DIRECT, b'1' * N, 0),
    'buffered write': lambda: write_all(0, b'2' * 1000, 50),
    'misaligned write': lambda: write_all(os.O_DIRECT, b'3' * 1000, 50),
    'forty at once': together,
    'killed in flight': lambda: killed(os.O_DIRECT),
    'killed at a thread': lambda: killed(0),
    'system calls': calls,
    'streams': streams,
    'text': text,
    'copy': copied,
    'new hub': new_hub,
    'child': child,
}


def fds():
    return len(os.listdir('/proc/self/fd'))


def check_that_all_is_well():
    with gevent.Timeout(20):
        read_all(os.O_DIRECT)
        together()
        write_all(os.O_DIRECT, b'4' * N, N)
    driver = _hub.get_driver()
    for _ in range(400):
        if not len(driver.engine.in_flight) + len(driver.engine.lent) and fds() <= before:
            break
        gc.collect()
        gevent.sleep(0.005)
    driver.engine._check()
    assert len(driver.engine.in_flight) == len(driver.engine.lent) == driver.waiting == 0
    assert fds() <= before, (fds(), before)


read_all(0)                             # what is there once per process
before = fds() + 5
check_that_all_is_well()
before = fds()
for name, operation in operations.items():
    n, failed = 0, 0
    while True:
        n += 1
        sweep.sweep_begin(which, n, last or n, code)
        try:
            with gevent.Timeout(20):
                operation()
        except (OSError, MemoryError, RuntimeError, ResourceWarning):
            failed += 1
            message = traceback.format_exc()
        except BaseException:
            sweep.sweep_end()
            print(f'{name}, call {n}', file=sys.stderr)
            raise
        finally:
            needed = sweep.sweep_end()
        try:
            check_that_all_is_well()
        except BaseException:
            print(f'after {name}, call {n}', message, file=sys.stderr)
            raise
        if needed < n:
            break
    print(f'{name}: {n - 1} calls, {failed} times an error')
