"""A process forks while a greenlet or thread uses a number; the child closes it."""

import errno
import os
import sys
import threading
import time
import warnings

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
import gevent

import greenaio.os

reading, writing = os.pipe()
name = f'/proc/self/fd/{reading}'
pipe = os.readlink(name)


def use():
    try:
        greenaio.os.read(reading, 1)
    except OSError as error:
        return error.errno


if sys.argv[1] == 'greenlet':
    user = gevent.spawn(use)
    gevent.sleep(0.05)
else:
    threading.Thread(target=use, daemon=True).start()
    time.sleep(0.2)
pid = os.fork()
if pid == 0:
    gevent.reinit()
    greenaio.os.close(reading)
    gevent.sleep(0.1)
    assert sys.argv[1] == 'thread' or user.value == errno.EBADF, user.value     # the copy of it here
    os._exit(os.path.lexists(name) and os.readlink(name) == pipe)
status = os.waitpid(pid, 0)[1]
os.write(writing, b'x')
assert status == 0, 'the number is open in the child'
