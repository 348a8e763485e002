"""A process forks inside `greenaio.uninterrupted`, beside a thread that is inside as well."""

import os
import sys
import threading

import gevent
from gevent.exceptions import BlockingSwitchOutError

import greenaio

entered, stop = threading.Event(), threading.Event()


def other():
    with greenaio.uninterrupted():
        entered.set()
        stop.wait()


thread = threading.Thread(target=other)
thread.start()
entered.wait()
file = greenaio.File(sys.argv[1])


def can_wait():
    try:
        return len(file.pread(8, 0)) == 8
    except BlockingSwitchOutError:
        return False


with greenaio.uninterrupted():
    child = gevent.os.fork()
    told = [can_wait()]
told.append(can_wait())
told.append(len(greenaio._core.uninterrupted.inside))
if child == 0:
    os._exit(7 if told == [False, True, 0] else 1)
assert os.waitpid(child, 0)[1] == 7 << 8
assert told == [False, True, 1], told
stop.set()
thread.join()
