"""A thread has opened a file, and the hub ends or forks before its greenlet gets the fd."""

import os
import sys
import time
import warnings

import gevent

import greenaio.os
from greenaio._core import hub as _hub

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
path, ends = sys.argv[1:]
greenaio.os.stat('/')


def opened():
    return [fd for fd in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{fd}')
            and os.readlink(f'/proc/self/fd/{fd}') == path]


greenlets = [gevent.spawn(greenaio.os.open, path, os.O_RDWR | os.O_CREAT) for _ in range(10)]
gevent.sleep(0)
end = time.monotonic() + 20
while len(opened()) < 10 and time.monotonic() < end:
    time.sleep(0.01)
engine = _hub.get_driver().engine
_hub.get_driver()._on_eventfd()         # type: ignore[attr-defined]   # reaps; but only the hub hands over
assert len(engine.ready) == 10
if ends == 'destroy':
    gevent.get_hub().destroy()
elif child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    gevent.joinall(greenlets, raise_error=True)
    os._exit(0)
else:
    gevent.get_hub().exception_stream = None
    gevent.joinall(greenlets)
until = time.monotonic() + 10
while opened() and time.monotonic() < until:    # threads close them
    time.sleep(0.01)
assert not opened(), opened()
os._exit(0)
