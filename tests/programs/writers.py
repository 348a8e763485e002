"""Lines that several writers write to one position, and a count of those that were lost."""

import gevent.monkey

gevent.monkey.patch_all()
import greenaio.monkey

greenaio.monkey.patch_all()             # gevent finds the plugin only where greenaio is installed
import os
import sys

import gevent

gevent.get_hub()
path, lines = sys.argv[1], 2000


def line(writer, i):
    return b'%s %06d .............................\n' % (writer, i)


def write(writer):
    for i in range(lines):
        os.write(fd, line(writer, i))


def until_it_writes(other):
    while os.stat(path).st_size == 0:
        assert other.poll() is None
        gevent.sleep(0.001)


def check(writers):
    with open(path, 'rb') as file:
        found = file.read().splitlines(keepends=True)
    lost = {line(writer, i) for writer in writers for i in range(lines)} - set(found)
    print(len(lost))


OTHER = """
import os, sys
for i in range(int(sys.argv[1])):
    os.write(1, b'other %06d .............................\\n' % i)
"""
fd = os.open(path, os.O_RDWR | os.O_CREAT)
