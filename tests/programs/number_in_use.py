"""A process forks while a greenlet or thread uses a number; the child closes it."""

import os
import sys
import threading
import time
import warnings

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
import gevent

import greenaio.os

reading, writing = os.pipe()


def use():
    greenaio.os.read(reading, 1)


if sys.argv[1] == 'greenlet':
    gevent.spawn(use)
    gevent.sleep(0.05)
else:
    threading.Thread(target=use, daemon=True).start()
    time.sleep(0.2)
pid = os.fork()
if pid == 0:
    gevent.reinit()
    greenaio.os.close(reading)
    gevent.sleep(0.1)
    os._exit(os.path.exists(f'/proc/self/fd/{reading}'))
status = os.waitpid(pid, 0)[1]
os.write(writing, b'x')
assert status == 0, 'the number is open in the child'
