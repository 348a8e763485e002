"""A hub ends while its greenlets wait for the other end of a FIFO."""

import errno
import os
import sys
import threading
import time
import warnings

import gevent

import greenaio.os

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
fifo, end = sys.argv[1:]


def wait():
    try:
        greenaio.os.open(fifo, os.O_RDONLY)
    except OSError as error:
        return error.errno


def work():
    waiting = gevent.spawn(wait)
    gevent.sleep(0.05)
    if end == 'destroy':
        gevent.get_hub().destroy(True)
    return waiting


if end == 'destroy':
    greenaio.os.stat('/')
    fds = len(os.listdir('/proc/self/fd'))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    until = time.monotonic() + 10
    while len(os.listdir('/proc/self/fd')) > fds:
        time.sleep(0.01)
        assert time.monotonic() < until, (fds, os.listdir('/proc/self/fd'))
    sys.exit()
waiting = work()
if end == 'fork':
    pid = gevent.os.fork_gevent()
    if pid == 0:
        assert waiting.get(timeout=5) == errno.ECANCELED
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    waiting.kill()
    gevent.sleep(0.05)
elif end == 'raise':
    sys.exit(7)
