"""A process forks while a greenlet waits for sectors; the child has another file behind the number."""

import errno
import os
import sys
import warnings

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
import gevent

import greenaio.os
from greenaio import monkey

monkey.patch_os()
path, other = (os.path.join(sys.argv[1], name) for name in ('data', 'other'))
with open(path, 'wb') as made:
    made.write(bytes(4096))
    os.fsync(made.fileno())
fd = os.open(path, os.O_RDWR | os.O_DIRECT)
answers: list[int | None] = []


def write(data):
    try:
        answers.append(greenaio.os.pwrite(fd, data, 100))
    except OSError as error:
        answers.append(error.errno)


jobs = [gevent.spawn(write, data) for data in (b'first', b'second')]
gevent.sleep(0)
assert not answers
pid = os.fork()
if pid == 0:
    os.close(fd)
    assert os.open(other, os.O_RDWR | os.O_CREAT) == fd
    gevent.reinit()
    gevent.joinall(jobs, timeout=10)
    assert answers == [errno.EBADF, errno.EBADF], answers
    os._exit(os.stat(other).st_size > 0)
assert os.waitpid(pid, 0)[1] == 0, 'the child wrote to another file'
gevent.joinall(jobs)
assert answers == [5, 6], answers
