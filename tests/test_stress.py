"""Everything at once, seeded: reads, writes, kills, timeouts, several hubs, `_check()` after each step."""

import ctypes
import errno
import mmap
import os
import random
import threading

import gevent
import pytest

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from greenaio._core import loop as _loop
from greenaio._core.request import Request, State
from tests.support.disks import MIB, file_system
from tests.support.kernel import ScriptedContext
from tests.support.processes import run_python


@pytest.mark.parametrize('seed', range(10))
def test_scripted_kernel_kills_and_timeouts_at_random(seed):
    """A kernel that reorders, completes in line, accepts short, says EAGAIN; greenlets that are killed,
    time out, or get an answer: each request ends exactly once, no buffer is written after its end."""
    rng = random.Random(seed)
    kernel = ScriptedContext()
    driver = _loop.HubDriver(gevent.get_hub(), kernel, depth=rng.choice([1, 8, 64]))
    ends = []

    def worker(number):
        memory = bytearray(64)
        try:
            with gevent.Timeout(rng.choice([0.0005, 0.005, 60])):
                result = driver.perform_request(Request(0, 3, memory, number))
            assert result == 64 or result < 0
            assert result < 0 or memory == bytes([number % 251]) * 64
            ends.append(number)
        except (gevent.Timeout, gevent.GreenletExit):
            ends.append(number)

    greenlets, number = [], 0
    for _ in range(600):
        step = rng.random()
        if step < 0.5:
            for _ in range(rng.randrange(1, 5)):
                greenlets.append(gevent.spawn(worker, number))
                number += 1
        elif step < 0.6:
            kernel.answers.append(rng.choice([-11, -4, lambda batch: rng.randrange(1, len(batch) + 1)]))
        elif step < 0.8 and kernel.taken:
            request = rng.choice(kernel.taken)
            kernel.finish(request, fill=request['offset'] % 251)
        elif step < 0.9 and greenlets:
            rng.choice(greenlets).kill(block=False)
        gevent.sleep(0 if rng.random() < 0.9 else 0.001)
        driver.engine._check()
    kernel.answers.clear()
    while not all(greenlet.ready() for greenlet in greenlets):
        while kernel.taken:
            kernel.finish(kernel.taken[0], fill=kernel.taken[0]['offset'] % 251)
        gevent.sleep(0.0005)        # not 0: the eventfd is looked at when the loop comes round
        driver.engine._check()
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    started = [i for i, greenlet in enumerate(greenlets)
               if not isinstance(greenlet.value, gevent.GreenletExit)]
    assert sorted(set(ends)) == sorted(ends), 'ended twice'
    assert set(started) <= set(ends)
    kernel.finish_all()
    gevent.sleep(0.005)
    assert driver.waiting == 0 and len(driver.engine.in_flight) == 0
    driver.close()


@pytest.mark.parametrize('seed', range(4))
def test_real_kernel_against_a_model(folder, seed):
    """Random aligned reads and writes on disjoint ranges, direct and buffered fds, vectored, fsync, some
    killed: identical to a bytearray at every read and at the end."""
    rng = random.Random(seed)
    path = os.path.join(folder, 'model')
    share = 64 * 1024
    workers = 16
    with open(path, 'wb') as file:
        file.write(bytes(share * workers))
        os.fsync(file.fileno())
    model = bytearray(share * workers)
    engine = _hub.get_driver().engine

    def worker(number, seed):
        rng = random.Random(seed)
        base = number * share
        for _ in range(60):
            n = rng.choice([512, 4096, 8192])
            at = base + rng.randrange(0, share - n + 1, 512) // n * n
            action = rng.random()
            buffer = aligned_buffer(n)
            if action < 0.4:
                buffer[:] = bytes([rng.randrange(256)]) * n
                if rng.random() < 0.5:
                    assert file.pwrite(buffer, at) == n
                else:
                    assert file.pwritev([buffer[:n // 2], buffer[n // 2:]], at) == n
                model[at:at + n] = buffer
            elif action < 0.8:
                assert file.preadv([buffer], at) == n
                assert bytes(buffer) == model[at:at + n]
            elif action < 0.9:
                assert file.pread(n, at) == model[at:at + n]
            elif action < 0.95:
                gevent.spawn(file.preadv, [aligned_buffer(n)], at).kill()
            else:
                file.fdatasync()
            engine._check()

    with File(path, os.O_RDWR | rng.choice([os.O_DIRECT, os.O_DIRECT, 0])) as file:
        gevent.joinall([gevent.spawn(worker, i, seed * 100 + i) for i in range(workers)],
                       raise_error=True, timeout=60)
        file.fsync()
    with open(path, 'rb') as file:
        assert file.read() == model


def test_every_place_of_a_batch_may_be_bad(data_file):
    """Thirty-two reads in one turn, one of them on a bad fd, past the end, misaligned, or into bad memory."""
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    driver = _hub.get_driver()
    no_memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(no_memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 4096, 0) == 0
    misaligned = 4096 if file_system(data_file) == 'tmpfs' else -errno.EINVAL
    for place in range(32):
        for bad, wanted in (((9999, aligned_buffer(4096), 0), -errno.EBADF),
                            ((fd, aligned_buffer(4096), 4 * MIB), 0),
                            ((fd, aligned_buffer(4096), 1), misaligned), ((fd, no_memory, 0), -errno.EFAULT)):
            requests = [Request(0, fd, aligned_buffer(4096), i * 4096) for i in range(32)]
            requests[place] = Request(0, *bad)
            greenlets = [gevent.spawn(driver.perform_request, request) for request in requests]
            gevent.joinall(greenlets, raise_error=True)
            assert greenlets.pop(place).value == wanted
            assert {greenlet.value for greenlet in greenlets} == {4096}
            assert all(request.state == State.DONE for request in requests)
    os.close(fd)


def test_threads_with_own_hubs_share_a_file(data_file):
    errors = []
    with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
        def work(number):
            try:
                def read(i):
                    at = (i * 7 + number) % 256 * 4096
                    assert file.pread(4096, at)[:8] == (at // 8).to_bytes(8, 'little')
                for _ in range(5):
                    gevent.joinall([gevent.spawn(read, i) for i in range(100)], raise_error=True)
                gevent.get_hub().destroy(True)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_driver_of_another_thread_refuses(data_file):
    driver = _hub.get_driver()
    caught = []

    def work():
        try:
            driver.perform_request(Request(0, 3, bytearray(10)))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(caught[0], RuntimeError)
    assert 'hub' in str(caught[0])


@pytest.mark.parametrize('end', ['sys.exit(3)', 'os._exit(3)', 'raise SystemExit(3)',
                                 'gevent.get_hub().destroy(True); sys.exit(3)'])
def test_exit_with_requests_in_flight_has_its_status_and_prints_nothing(data_file, end):
    done = run_python(f'''
        import gevent, os, sys
        from greenaio import File
        file = File(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
        greenlets = [gevent.spawn(file.pread, 4096, i % 256 * 4096) for i in range(500)]
        gevent.sleep(0)
        {end}
    ''', data_file, check=False)
    assert (done.returncode, done.stderr) == (3, '')


def test_sigterm_with_requests_in_flight_ends_the_process(data_file):
    done = run_python('''
        import gevent, os, signal, sys
        from greenaio import File
        file = File(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
        greenlets = [gevent.spawn(file.pread, 4096, i % 256 * 4096) for i in range(500)]
        gevent.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        gevent.sleep(10)
    ''', data_file, check=False)
    assert done.returncode == -15 and done.stderr == ''


def test_million_requests_do_not_grow_the_process():
    run_python('''
        import gc, gevent, os
        from greenaio import File, aligned_buffer
        def resident():
            gc.collect()
            with open('/proc/self/statm') as file:
                return int(file.read().split()[1]) * 4096
        fd = os.memfd_create('x')
        os.ftruncate(fd, 1 << 20)
        path = f'/proc/self/fd/{fd}'
        with File(path, os.O_RDONLY | os.O_DIRECT) as file:
            def work(n):
                buffers = [aligned_buffer(512)]
                for i in range(n):
                    file.preadv(buffers, i % 2048 * 512)
            def round(n):
                gevent.joinall([gevent.spawn(work, n) for _ in range(20)], raise_error=True)
            round(2000)
            before = resident()
            round(50_000)
            assert resident() - before < 1 << 20, resident() - before
    ''')
