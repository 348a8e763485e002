"""Open a file, read it and close it. Two calls of getppid() mark the last time."""

import os
import sys

import gevent

import greenaio

path, mode = sys.argv[1:]


def read():
    with greenaio.open(path, mode) as file:
        assert len(file.read()) == 4096


def measure():
    for _ in range(3):                  # the hub has its turn between them, and none during the last
        gevent.sleep(0.01)
        read()
    gevent.sleep(0.01)
    os.getppid()
    read()
    os.getppid()


gevent.spawn(measure).join()
