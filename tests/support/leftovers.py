"""Find the requests, waiting greenlets and open files that a test leaves behind."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import socket

import gevent

import greenaio


def unfinished_work(driver):
    """Return the numbers of requests in flight, of requests lent to threads, and of waiting greenlets; () if
    all are 0."""
    counts = len(driver.engine.in_flight), len(driver.engine.lent), driver.waiting
    return counts if any(counts) else ()


def open_files():
    """Return the path or the kind of each open file, by its number."""
    found = {}
    for fd in os.listdir('/proc/self/fd'):
        with contextlib.suppress(FileNotFoundError):        # the listing itself used this number
            found[int(fd)] = os.readlink(f'/proc/self/fd/{fd}')
    return found


def close_files(leaked):
    """Close the file objects that have one of these numbers, then the numbers of files that are open still.
    Pipes, sockets and eventfds without an object here may be the hub's."""
    for thing in gc.get_objects():
        if issubclass(type(thing), (io.IOBase, socket.socket, greenaio.File)):
            with contextlib.suppress(Exception, gevent.Timeout), gevent.Timeout(1):
                if thing.fileno() in leaked:
                    thing.close()
    now = open_files()
    for fd, path in leaked.items():
        if path.startswith('/') and now.get(fd) == path:
            os.close(fd)
