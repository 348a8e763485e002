"""Print the bytes of resident memory per greenlet that sleeps, or that waits for a request."""

import gc
import sys

import gevent

from greenaio._core import loop as _loop
from greenaio._core.request import Request
from tests.support.kernel import ScriptedContext


def resident():
    gc.collect()
    with open('/proc/self/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('Rss:')) * 1024


driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=256)
buffers = [bytearray(64) for _ in range(10_000)]
perform = driver.perform_request
event = gevent.event.Event()
begun = 0


def wait(buffer):
    global begun
    begun += 1
    perform(Request(0, 3, buffer))


def sleep(buffer):
    global begun
    begun += 1
    event.wait()


def cost(function):
    before = resident()
    greenlets = [gevent.spawn(function, buffer) for buffer in buffers]
    while begun < len(buffers):         # a busy machine takes its time
        gevent.sleep(0.01)
    return (resident() - before) / len(buffers), greenlets


if sys.argv[1] == 'sleep':
    print(cost(sleep)[0])
else:
    print(cost(wait)[0])
