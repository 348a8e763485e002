"""Every core scenario is repeated until nothing of it is left: LEAK of the matrix.

One fresh process for each place and loop goes through the table. After a warm-up it measures what an attempt
of some rounds has left: one attempt of the first few must leave nothing. Caches fill up and threads start
once; a leak of 16 bytes a round, or of one object, fd, thread or page in 8, is there in every attempt.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import sys
import threading
import time
import weakref

import gevent
import pytest
from greenlet import greenlet

import greenaio.os
from greenaio import File, aligned_buffer, copyfile, monkey
from greenaio._core import hub as _hub
from greenaio._core import pools as _pools
from greenaio._files import pool as _pool
from greenaio.block import BlockDevice
from tests.support.disks import MIB, pattern, temporary_folder
from tests.support.processes import contexts, run_python, side_by_side

ATTEMPTS = 12
COUNTED = ('objects', 'greenlets', 'fds', 'threads', 'contexts', 'blocks of Python', 'bytes of C', 'pages')

SCENARIOS = {}                  # function: rounds of an attempt, what to compare it with, objects kept


def scenario(rounds, beside=None, kept=0):
    """*beside* is the same without greenaio: what gevent itself leaves does not count, nor *kept* objects
    that hang on it."""
    def add(function):
        SCENARIOS[function] = rounds, beside, kept
        return function
    return add


# The scenarios -----------------------------------------------------------------------------------

class Place:
    """Files in *folder*: what the scenarios work with."""

    def __init__(self, folder):
        self.folder = folder
        self.path = os.path.join(folder, 'data')
        with open(self.path, 'wb') as file:
            file.write(pattern(MIB))
            os.fsync(file.fileno())
        self.direct = File(self.path, os.O_RDWR | os.O_DIRECT)
        self.cached = File(self.path, os.O_RDWR)
        self.memory = [aligned_buffer(4096) for _ in range(3)]

    def new(self, name='new'):
        return os.path.join(self.folder, name)


@scenario(300)
def read_direct(place):
    place.direct.pread(4096, 8192)


@scenario(100)
def read_direct_by_many(place):
    gevent.joinall([gevent.spawn(place.direct.pread, 4096, 4096 * i) for i in range(10)], raise_error=True)


@scenario(300)
def read_into_many_buffers(place):
    place.direct.preadv(place.memory, 0)


@scenario(100)
def read_misaligned(place):
    place.direct.pread(1000, 777)


@scenario(1000)
def read_what_is_cached(place):
    place.cached.pread(4096, 8192)


@scenario(100)
def read_what_is_not_cached(place):
    os.posix_fadvise(place.cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    place.cached.pread(4096, 65536)


@scenario(100)
def write_direct(place):
    place.direct.pwrite(place.memory[0], 4096)


@scenario(100)
def write_many_buffers(place):
    place.direct.pwritev(place.memory, 4096)


@scenario(20)
def write_misaligned(place):
    place.direct.pwrite(b'misaligned', 777)


@scenario(100)
def write_through_the_cache(place):
    place.cached.pwrite(b'x' * 5000, 777)


@scenario(50)
def write_and_sync(place):
    place.cached.pwrite(b'x', 0)
    place.cached.fsync()
    place.direct.fdatasync()


@scenario(50)
def kill_in_flight(place):
    readers = [gevent.spawn(place.direct.pread, 65536, 65536 * i) for i in range(8)]
    gevent.sleep(0)
    gevent.killall(readers)


@scenario(50)
def kill_a_vector_in_flight(place):
    reader = gevent.spawn(place.direct.preadv, [bytearray(4096), aligned_buffer(4096)], 0)
    gevent.sleep(0)
    reader.kill()


@scenario(50)
def kill_while_pending(place):
    """Started in one turn: the first is in flight, and the next wait for the end of the turn."""
    readers = [gevent.spawn(place.direct.pread, 4096, 4096 * i) for i in range(5)]
    gevent.get_hub().loop.run_callback(lambda: [reader.throw(gevent.GreenletExit) for reader in readers])
    gevent.joinall(readers)


@scenario(50)
def kill_while_a_thread_works(place):
    os.posix_fadvise(place.cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    readers = [gevent.spawn(place.cached.pread, 65536, 65536 * i) for i in range(4)]
    gevent.sleep(0)
    gevent.killall(readers)


@scenario(50)
def kill_in_open(place):
    opener = gevent.spawn(greenaio.os.open, place.new(), os.O_RDWR | os.O_CREAT)
    gevent.sleep(0)
    opener.kill()
    if isinstance(opener.value, int):   # a thread was quicker
        os.close(opener.value)


@scenario(50)
def time_out(place):
    def read():
        with gevent.Timeout(0, False):
            place.direct.pread(MIB, 0)

    gevent.joinall([gevent.spawn(read) for _ in range(2)], raise_error=True)


@scenario(50)
def close_in_flight(place):
    file = File(place.path, os.O_RDONLY | os.O_DIRECT)
    reader = gevent.spawn(file.pread, 65536, 0)
    gevent.sleep(0)
    file.close()
    reader.join()


@scenario(100)
def open_and_close_a_file(place):
    File(place.path, os.O_RDONLY).close()
    File(place.path, os.O_RDWR | os.O_DIRECT).close()


@scenario(50)
def open_binary_write_and_read(place):
    with greenaio.open(place.new(), 'wb') as file:
        file.write(b'x' * 10000)
    with greenaio.open(place.new(), 'rb+') as file:
        assert len(file.read()) == 10000
        file.seek(0)
        file.write(b'y')


@scenario(50)
def open_text_write_and_read(place):
    with greenaio.open(place.new(), 'w') as file:
        print('words', file=file)
    with greenaio.open(place.new()) as file:
        assert list(file) == ['words\n']


@scenario(10)
def stream_there_and_back(place):
    with greenaio.open(place.new(), 'wb', direct=True, prefetch=2) as file:
        for _ in range(8):
            file.write(bytes(50000))
    with greenaio.open(place.new(), 'rb', direct=True, prefetch=2) as file:
        while file.read(65536):
            pass


@scenario(20)
def stream_is_left_in_the_middle(place):
    with greenaio.open(place.path, 'rb', prefetch=4) as file:
        file.read(65536)


@scenario(10)
def copy_a_file(place):
    copyfile(place.path, place.new('copy'))


@scenario(100)
def block_device(place):
    with BlockDevice(place.path) as device:
        device.pwrite(bytes(4096), 4096)
        device.pread(5000, 100)
        for _ in device.pread_each([(4096, 0), (4096, 8192)]):
            pass
        device.block_status(MIB, 0)
        device.flush()


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def destroy_hub():
    hub = gevent.get_hub()
    hub.destroy(destroy_loop=True)
    with contextlib.suppress(gevent.exceptions.LoopExit):
        hub.throw(gevent.GreenletExit)  # what is suspended when its thread ends, greenlet keeps for ever


def wait_in_hub():
    """As a driver does: a watcher on an eventfd."""
    fd = os.eventfd(1)
    watcher = gevent.get_hub().loop.io(fd, 1)
    gevent.get_hub().wait(watcher)
    watcher.close()
    os.close(fd)


def thread_that_destroys_its_hub(place):
    def work():
        wait_in_hub()
        destroy_hub()
    in_thread(work)


def thread_that_leaves_its_hub(place):
    def work():
        wait_in_hub()
        gevent.sleep(0)
    in_thread(work)


@scenario(10, beside=thread_that_destroys_its_hub)
def hub_of_a_thread_is_destroyed(place):
    def work():
        place.direct.pread(4096, 0)
        gevent.sleep(0)
        destroy_hub()
    in_thread(work)


@scenario(10, beside=thread_that_destroys_its_hub)
def hub_of_a_thread_is_destroyed_in_flight(place):
    def work():
        readers = [gevent.spawn(place.direct.pread, 65536, 65536 * i) for i in range(4)]
        gevent.sleep(0)
        for reader in readers:          # else gevent keeps them, parked in a hub that is gone
            reader.kill()
        destroy_hub()
    in_thread(work)


@scenario(10, beside=thread_that_leaves_its_hub, kept=4)
def thread_just_ends(place):
    """gevent keeps the hub, and that what calls us when it is destroyed."""
    def work():
        place.direct.pread(4096, 0)
        gevent.sleep(0)
    in_thread(work)


@scenario(5)
def fork_in_flight(place):
    readers = [gevent.spawn(place.direct.pread, 65536, 65536 * i) for i in range(4)]
    gevent.sleep(0)
    pid = os.fork()
    if pid == 0:
        try:
            gevent.reinit()
            gevent.get_hub().exception_stream = None    # inherited greenlets fail, and are printed
            place.direct.pread(4096, 0)
            os._exit(0)
        finally:
            os._exit(1)
    gevent.joinall(readers, raise_error=True)
    assert os.waitpid(pid, 0)[1] == 0


def refused(call, *args):
    try:
        call(*args)
    except OSError:
        return
    raise AssertionError(f'{call} worked')


@scenario(50)
def operations_that_fail(place):
    read_only = File(place.path, os.O_RDONLY | os.O_DIRECT)
    refused(greenaio.os.pread, 9999, 4096, 0)
    refused(greenaio.os.fsync, 9999)
    refused(greenaio.open, place.new('missing'))
    refused(File, place.new('missing/deep'), os.O_RDONLY)
    refused(place.direct.pread, 4096, -1)
    refused(read_only.pwrite, place.memory[0], 0)
    refused(read_only.pwritev, place.memory, 0)
    refused(BlockDevice, place.folder)
    read_only.close()


@scenario(50)
def bad_arguments(place):
    for call, *args in ((place.direct.preadv, [bytearray(1), 'x'], 0), (place.direct.preadv, [b'x'], 0),
                        (place.direct.pwritev, [b'x', 1], 0), (place.direct.pwrite, 'x', 0)):
        try:
            call(*args)
        except (TypeError, BufferError):
            continue
        raise AssertionError(call)


@scenario(20)
def patch_and_unpatch(place):
    monkey.patch_all()
    with open(place.path, 'rb') as file:
        file.read(10)
    monkey.unpatch_all()


# The meter ---------------------------------------------------------------------------------------

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd',
        'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo


def settle():
    """Until what was abandoned is done, and threads that end have ended."""
    engine = _hub.get_driver().engine
    end = time.monotonic() + 5
    while time.monotonic() < end:
        gevent.sleep(0.002)
        workers = sum(pool.threads for pool in _pools.pools()) + _pool.thread_pool().size
        requests = len(engine.in_flight) + len(engine.lent) + len(engine.ready)
        if len(os.listdir('/proc/self/task')) == 1 + workers and requests == 0:
            break
    engine._check()
    # What Python keeps of gevent's patching: what each folder of its path had at each time that it changed,
    # and each name that was looked for in a type, though it was made for that.
    importlib.invalidate_caches()
    sys._clear_type_cache()
    for _ in range(3):
        gc.collect()


def measure(into):
    settle()
    into[4] = contexts()
    with open('/proc/self/statm') as file:
        into[7] = int(file.read().split()[1])
    into[2] = len(os.listdir('/proc/self/fd'))
    into[3] = len(os.listdir('/proc/self/task'))
    objects = gc.get_objects()
    into[0] = len(objects)
    into[1] = sum(isinstance(one, greenlet) for one in objects)
    del objects
    info = libc.mallinfo2()
    into[6] = info.uordblks + info.hblkhd
    del info
    into[5] = sys.getallocatedblocks()      # last: all that was made here is gone


def left_by(work, place, rounds, beside, kept):
    """What the best attempt left: an empty dict for nothing."""
    start, before, after = (array.array('q', [0] * len(COUNTED)) for _ in range(3))
    kept *= rounds
    few = max(2, rounds // 8)
    allowed = [kept, 0, 0, 0, 0, few + 3 * kept, 16 * rounds + 256 * kept, few + kept // 16]

    def attempt():
        measure(start)
        for _ in range(rounds if beside else 0):
            beside(place)
        measure(before)
        for _ in range(rounds):
            work(place)
        measure(after)

    left = {}
    for number in range(ATTEMPTS + 1):
        attempt()
        more = [c - b - max(0, b - a) for a, b, c in zip(start, before, after)]
        left = {name: n for name, n, most in zip(COUNTED, more, allowed) if n > most}
        if number and not left:         # the first warms up
            break
    return left


def main(folder, names=''):
    logging.getLogger('greenaio').disabled = True
    place = Place(folder)
    for work, expected in SCENARIOS.items():
        if not names or work.__name__ in names.split():
            began = time.monotonic()
            left = left_by(work, place, *expected)
            print(json.dumps([work.__name__, left, round(time.monotonic() - began, 2)]), flush=True)


# The test ----------------------------------------------------------------------------------------

def run_all(kind, loop):
    """In one arena of malloc: in several, the memory that is free between the hubs that gevent keeps of ended
    threads looks used."""
    with temporary_folder(kind) as folder:
        code = 'import sys; from tests.faults import test_leaks; test_leaks.main(sys.argv[1])'
        return run_python(code, folder, env={'GEVENT_LOOP': loop, 'MALLOC_ARENA_MAX': '1'},
                          timeout=500)


@pytest.fixture(scope='module')
def runs(request):
    return side_by_side(request, 'test_nothing_is_left', run_all)


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
@pytest.mark.parametrize('kind', ['disk', 'memory'])
def test_nothing_is_left(request, runs, kind, loop):
    done = runs[request.node.name].result()
    left = {name: left for name, left, seconds in map(json.loads, done.stdout.splitlines())}
    assert len(left) == len(SCENARIOS)
    assert {name: what for name, what in left.items() if what} == {}


if __name__ == '__main__':
    main(*sys.argv[1:])


def test_destroyed_hub_of_a_thread_leaves_no_driver(data_file):
    """gevent keeps that hub, and the frame that destroyed it with all its variables."""
    drivers = []

    def work():
        with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
            file.pread(4096, 0)
        drivers.append(weakref.ref(_hub.get_driver()))
        gevent.get_hub().destroy(destroy_loop=True)

    in_thread(work)
    for _ in range(1000):               # a native thread ends the context
        gc.collect()
        if drivers[0]() is None:
            break
        time.sleep(0.005)
    assert drivers[0]() is None
