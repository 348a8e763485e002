"""A disk stands still for a while, and greenlets that do not use it measure how long their work takes."""

import os
import socket
import sys
import time
from collections.abc import Callable

import gevent
from gevent import subprocess  # what freezes the disk must not stop the hub itself

from greenaio import File
from greenaio._core import hub as _hub

path, healthy, freeze, thaw, frozen = *sys.argv[1:5], float(sys.argv[5])
MANY = 4 * 128                  # four times what a device's queue holds
operations: list[Callable[[], object]] = []     # on the disk that stands still
neighbours: list[Callable[[], object]] = []     # on the other disk


def watch():
    """Spawn greenlets that tick, ask DNS and read from another disk; list how long each step took."""
    gaps, names, reads, end = [0.0], [0.0], [0.0], time.monotonic() + frozen

    def tick():
        while (now := time.monotonic()) < end:
            gevent.sleep(0.001)
            gaps.append(time.monotonic() - now - 0.001)

    def look_up():
        while (now := time.monotonic()) < end:
            socket.getaddrinfo('localhost', 80)
            names.append(time.monotonic() - now)
            gevent.sleep(0.02)

    def read():
        with File(healthy, os.O_RDONLY | os.O_DIRECT) as file:
            while (now := time.monotonic()) < end:
                file.pread(4096, 0)
                for operation in neighbours:
                    operation()
                reads.append(time.monotonic() - now)
                gevent.sleep(0.002)
    return [gevent.spawn(what) for what in (tick, look_up, read)], (gaps, names, reads)


def p99(values):
    return sorted(values)[len(values) * 99 // 100]


def taken_away():
    """Seconds for which this thread wanted a processor and had none, or which the host took."""
    with open('/proc/thread-self/schedstat') as file:
        waited = int(file.read().split()[1]) / 1e9
    with open('/proc/stat') as file:
        return waited + int(file.readline().split()[8]) / os.sysconf('SC_CLK_TCK')


def frozen_for_a_while():
    others, (_, _, before) = watch()
    gevent.joinall(others, raise_error=True)
    others, (gaps, names, reads) = watch()
    gevent.sleep(0.05)
    away = taken_away()
    thawing = subprocess.Popen(['sh', '-c', f'sleep {frozen + 0.3}; {thaw}'])
    subprocess.run(freeze.format(me=os.getpid()), shell=True, check=True)
    jobs = [gevent.spawn(operation) for operation in operations]
    gevent.joinall(others, raise_error=True)
    away = taken_away() - away
    waiting = sum(not job.ready() for job in jobs)
    thawing.wait()
    gevent.joinall(jobs, timeout=30, raise_error=True)
    assert all(job.ready() for job in jobs), 'some never ended'
    _hub.get_driver().engine._check()
    print(max(gaps), max(names), p99(reads), p99(before), waiting, away)


import gevent.monkey

gevent.monkey.patch_socket()
gevent.monkey.patch_dns()
size = 8 << 20
