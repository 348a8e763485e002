"""No thread can be started: each call is the plain one."""

import logging
import os
import sys

import greenaio.os

folder, group = sys.argv[1:]


def set_limit(value):
    with open(group + '/pids.max', 'w') as limit:
        limit.write(str(value))


def move_to(path):
    with open(path + '/cgroup.procs', 'w') as processes:
        processes.write(str(os.getpid()))


told: list[str] = []


class Listener(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())


logging.getLogger('greenaio').addHandler(Listener())
fd = os.open(folder + '/data', os.O_RDWR | os.O_CREAT)
greenaio.os.pread(fd, 1, 0)             # the hub's driver is there
move_to(group)
tasks = len(os.listdir('/proc/self/task'))
set_limit(tasks)
for name in '/new', '/newer':
    new = greenaio.os.open(folder + name, os.O_RDWR | os.O_CREAT)
    assert greenaio.os.write(new, b'x' * 5000) == 5000
    assert greenaio.os.stat(folder + name).st_size == 5000
    assert greenaio.os.pread(new, 1 << 20, 0) == b'x' * 5000
    greenaio.os.ftruncate(new, 3)
    greenaio.os.close(new)
with greenaio.open(folder + '/direct', 'wb', direct=True) as file:
    file.write(b'y' * 300000)           # behind the writer, and longer
assert greenaio.copyfile(folder + '/direct', folder + '/copy')
with greenaio.open(folder + '/copy', 'rb', direct=True, prefetch=3) as file:
    assert file.read() == b'y' * 300000
try:
    greenaio.os.open(folder + '/no/such', os.O_WRONLY | os.O_CREAT)
except FileNotFoundError as error:
    assert error.filename == folder + '/no/such'
assert len(told) == 1 and "can't start a thread" in told[0], told
assert len(os.listdir('/proc/self/task')) == tasks
set_limit('max')
os.close(greenaio.os.open(folder + '/new', os.O_WRONLY | os.O_CREAT))
assert len(os.listdir('/proc/self/task')) == tasks + 1
move_to('/sys/fs/cgroup/pids')
