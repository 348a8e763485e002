"""Write beyond RLIMIT_FSIZE: the process gets SIGXFSZ."""

import errno
import os
import resource
import signal
import sys

import gevent

import greenaio.monkey
import greenaio.os

os.chdir(sys.argv[1])
greenaio.monkey.patch_all()
gevent.sleep(0)
got: list[int] = []
signal.signal(signal.SIGXFSZ, lambda *args: got.append(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, -1))


def refused(call, *args):
    got.clear()
    try:
        call(*args)
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        raise AssertionError
    gevent.sleep(0)             # Python calls a handler when it likes
    return len(got)


with open('big', 'wb', 0) as file:
    file.write(b'x' * 8192)
    assert refused(file.write, b'y') == 1
    assert refused(os.ftruncate, file.fileno(), 10000) == 1
    assert refused(os.pwrite, file.fileno(), b'z', 9000) == 1
    assert os.stat('big').st_size == 8192
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # as Python begins
with open('big', 'ab', 0) as file:
    assert refused(file.write, b'y') == 0
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
if os.fork() == 0:
    with open('big', 'ab', 0) as file:
        file.write(b'y')
    os._exit(0)
assert os.WTERMSIG(os.wait()[1]) == signal.SIGXFSZ
