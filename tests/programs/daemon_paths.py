"""A child closes all numbers and opens its files on them, while it has copies of opens of its parent."""

import contextlib
import os
import sys
import tempfile
import warnings

import gevent

import greenaio.os
from greenaio._files import portable as _fallback

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
os.chdir(sys.argv[1])
os.mkfifo('fifo')
gevent.get_hub()
errors: list[OSError] = []


def wait(module):
    try:
        module.open('fifo', os.O_RDONLY)
    except OSError as error:
        errors.append(error)


jobs = [gevent.spawn(wait, module) for module in (greenaio.os, greenaio.os, _fallback)]
gevent.sleep(0.1)
pid = os.fork()
if pid == 0:
    gevent.reinit()
    for fd in range(3, 1024):           # but those of the loop
        with contextlib.suppress(OSError):
            if not os.readlink(f'/proc/self/fd/{fd}').startswith(('anon_inode', 'pipe')):
                os.close(fd)
    files = [tempfile.TemporaryFile() for _ in range(32)]           # noqa: SIM115
    gevent.joinall(jobs, timeout=10)
    assert len(errors) == 3, errors
    jobs.clear()
    errors.clear()
    for file in files:
        assert os.fstat(file.fileno()).st_nlink == 0, file
    os._exit(0)
status = os.waitpid(pid, 0)[1]
with contextlib.suppress(OSError):
    os.close(os.open('fifo', os.O_WRONLY | os.O_NONBLOCK))
assert status == 0, 'greenaio closed a file of the child'
os._exit(0)
