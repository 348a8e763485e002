"""A file to read, and `in_child`, which runs a function in a forked child."""

import os
import sys
import warnings

import gevent

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
from greenaio import File

path = sys.argv[1]
# Not File(path): that takes a thread, and under libuv gevent's thread pools hang the third generation
# in uv_loop_fork, with no greenaio about.
file = File.from_fd(os.open(path, os.O_RDONLY | os.O_DIRECT), closefd=True)


def read(i):
    data = file.pread(4096, i * 4096)
    assert data[:8] == (i * 512).to_bytes(8, 'little'), (i, data[:8])
    return 'ok'


def in_child(work, fork=os.fork):
    """Run work in a forked child; return its pid."""
    pid = fork()
    if pid:
        return pid
    try:
        gevent.reinit()
        gevent.get_hub().exception_stream = None    # inherited greenlets fail, and are printed
        work()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    os._exit(status)


def wait(pid):
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        gevent.sleep(0.005)
