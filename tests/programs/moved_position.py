"""A parked greenlet moves the position of a file that an uninterrupted one uses."""

from tests.programs.patched import assert_refused  # it patches, and so comes first

# isort: split
import os

import gevent
from gevent.event import Event

import greenaio
from greenaio._files import turn as _turn

file = open('data', 'w+b', buffering=0)     # noqa: SIM115
file.write(bytes(100))
fd, leave = file.fileno(), Event()


def move():
    with _turn.turn_of(fd):
        leave.wait()


mover = gevent.spawn(move)
gevent.sleep(0)
calls = [lambda: os.read(fd, 1), lambda: os.readv(fd, [bytearray(1)]), lambda: os.write(fd, b'x'),
         lambda: os.writev(fd, [b'x']), lambda: file.read(1), lambda: file.write(b'x'), lambda: file.seek(0)]
with greenaio.uninterrupted():
    assert_refused(calls)
    assert os.pread(fd, 1, 0) == bytes(1) and os.pwrite(fd, b'x', 0) == 1       # elsewhere
leave.set()
mover.join()
with greenaio.uninterrupted():
    for call in calls:
        call()
file.close()
