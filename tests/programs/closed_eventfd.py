"""Close an eventfd of greenaio by mistake: requests before and after end, also in forked children."""

import os
import sys

import gevent

from greenaio import File
from greenaio._core import hub as _hub

path, number = sys.argv[1:]
with open(path, 'rb') as data:
    content = data.read()
direct, cold = File(path, os.O_DIRECT), File(path)


def read(i):
    with gevent.Timeout(20):
        assert (cold if i % 3 == 0 else direct).pread(4096, 4096 * i) == content[4096 * i:][:4096]


def some():
    os.posix_fadvise(cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return [gevent.spawn(read, i) for i in range(100)]


gevent.joinall(some(), raise_error=True)
closed = getattr(_hub.get_driver().engine.context, number)
jobs = some()
gevent.sleep(0)
os.close(closed)
gevent.joinall(jobs, raise_error=True)
gevent.joinall(some(), raise_error=True)        # none in flight before
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        gevent.reinit()
        gevent.joinall(some(), raise_error=True)
        os._exit(0)
    gevent.joinall(some(), raise_error=True)
    assert os.waitpid(pid, 0)[1] == 0
    null = os.open('/dev/null', os.O_RDWR)
    if null != closed:
        os.dup2(null, closed)   # it is in use again; what we write there is lost
