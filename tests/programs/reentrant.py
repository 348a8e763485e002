"""Greenlets read while finalizers, signal handlers and callbacks, wherever they run, read as well."""

import gc
import os
import random
import signal
import sys
import threading
import time
import weakref

import gevent
import greenlet
from gevent.exceptions import BlockingSwitchOutError

import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub

path, mode = sys.argv[1:]
with open(path, 'rb') as file:
    DATA = file.read()
hub = gevent.get_hub()
direct, cached = File(path, os.O_DIRECT), File(path)
right = wrong = in_hub = depth = raised = 0


def by_fd(at):
    fd = greenaio.os.open(path, os.O_RDONLY)
    try:
        return greenaio.os.pread(fd, 999, at)
    finally:
        greenaio.os.close(fd)


def in_pieces(at):
    one, two = bytearray(1024), aligned_buffer(1024)
    direct.preadv([one, two], at)
    return bytes(one) + bytes(two)


WAYS = [lambda at: direct.pread(4096, at), lambda at: cached.pread(4096, at),
        lambda at: direct.pread(99, at), in_pieces, by_fd]


def read():
    global right, wrong, in_hub
    at = random.randrange(len(DATA) - 4096)
    way = random.choice(WAYS[:4] if mode == 'raise' else WAYS)
    try:
        got = way(at)
    except BlockingSwitchOutError:
        assert greenlet.getcurrent() is hub
        in_hub += 1
        return
    except RuntimeError as error:   # of a finalizer at the very end of a greenlet: it can't wait any more
        if mode != 'raise' and 'greenlet is being finalized' in str(error):
            return
        raise
    right += got == DATA[at:at + len(got)] != b''
    wrong += got != DATA[at:at + len(got)] or not got


def again(*args):
    global depth
    if depth < 3:
        depth += 1
        try:
            read()
        finally:
            depth -= 1


class Dying:
    def __init__(self):
        self.me = self              # a cycle: it dies wherever the collector runs

    def __del__(self):
        if mode == 'del':
            again()


class Hit(Exception):
    pass


def hit(*args):
    if greenlet.getcurrent() in reading:
        reading.discard(greenlet.getcurrent())      # who reports it is left alone
        raise Hit


kept: list[weakref.ref[Dying]] = []
reading: set[greenlet.greenlet] = set()


def work():
    global raised
    for _ in range(20):
        try:
            reading.add(gevent.getcurrent())
            read()
        except Hit:
            raised += 1
        finally:
            reading.discard(gevent.getcurrent())
        kept.append(weakref.ref(Dying(), again if mode == 'weakref' else None))
        del kept[:-50]
        if mode == 'callback':
            hub.loop.run_callback(again)


def thread():
    """No hub before the first read; and it is not destroyed."""
    for _ in range(20):
        at = random.randrange(len(DATA) - 4096)
        assert direct.pread(4096, at) == DATA[at:at + 4096]


if mode in ('del', 'weakref', 'gc'):
    gc.set_threshold(3, 2, 2)
if mode == 'gc':
    gc.callbacks.append(again)
ticking = None
if mode in ('signal', 'raise'):
    signal.signal(signal.SIGALRM, again if mode == 'signal' else hit)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    # gevent's libuv loop may lose a callback that a handler adds, and end as if it had none: not while
    # it ticks.
    ticking = hub.loop.timer(0.01, 0.01)
    ticking.start(lambda: None)
end = time.monotonic() + 0.4
while time.monotonic() < end:
    workers = [gevent.spawn(work) for _ in range(8)]
    threads = [threading.Thread(target=thread) for _ in range(4 * (mode == 'thread'))]
    for one in threads:
        one.start()
    gevent.wait(workers)
    for one in threads:
        one.join()
    assert all(one.successful() or isinstance(one.exception, Hit) for one in workers), workers
signal.setitimer(signal.ITIMER_REAL, 0)
if ticking is not None:
    ticking.stop()
    ticking.close()
gc.callbacks.clear()
gc.set_threshold(700, 10, 10)
engine = _hub.get_driver().engine
for _ in range(100):
    if not len(engine.in_flight) + len(engine.lent):
        break
    gevent.sleep(0.01)
engine._check()
assert len(engine.in_flight) == len(engine.lent) == _hub.get_driver().waiting == 0
assert right > 100 and not wrong, (right, wrong)
assert mode != 'callback' or in_hub
assert mode != 'raise' or raised
print('intact')
