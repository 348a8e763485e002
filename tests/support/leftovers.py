"""Look for what a test leaves behind: requests, greenlets that wait, open files."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import socket

import gevent

import greenaio


def unfinished_work(driver):
    """How many requests are in flight, or lent to threads, and how many greenlets wait: () if none."""
    counts = len(driver.engine.in_flight), len(driver.engine.lent), driver.waiting
    return counts if any(counts) else ()


def open_files():
    """By number, the path of each open file, or its kind."""
    found = {}
    for fd in os.listdir('/proc/self/fd'):
        with contextlib.suppress(FileNotFoundError):        # the one that listed them
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
