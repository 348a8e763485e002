"""A hub is destroyed while native threads make calls for it."""

import os
import sys
import threading
import time

import gevent

import greenaio.os
from greenaio._core import hub as _hub

fifo = sys.argv[1] + '/fifo'
os.mkfifo(fifo)


def fds():
    return len(os.listdir('/proc/self/fd'))


def work():
    gevent.spawn(greenaio.os.open, fifo, os.O_RDONLY)
    gevent.sleep(0.05)
    assert len(_hub.get_driver().engine.lent) == 1
    gevent.get_hub().destroy(True)


def once():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    writer = os.open(fifo, os.O_RDWR)
    time.sleep(0.1)
    os.close(writer)


once()
before = fds()
once()
end = time.monotonic() + 5
while fds() > before and time.monotonic() < end:
    time.sleep(0.01)
assert fds() == before, (fds(), before)
