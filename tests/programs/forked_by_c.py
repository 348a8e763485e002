"""A fork by C code, of which no hook of Python hears, and its end."""

import ctypes
import os
import signal

import gevent

libc = ctypes.PyDLL(None)


def finish(pid):
    """Wait for the child, for 5 s at most."""
    for _ in range(500):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        gevent.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'hangs'
