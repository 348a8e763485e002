"""All is patched, and a native lock is older than that."""

import _thread

early = _thread.allocate_lock()
import gevent.monkey

gevent.monkey.patch_all()
import greenaio.monkey

greenaio.monkey.patch_all()
import os
import sys

import gevent
from gevent.exceptions import BlockingSwitchOutError

import greenaio

gevent.get_hub()
os.chdir(sys.argv[1])
os.umask(0o022)


def evict(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def at_once(*work):
    jobs = [gevent.spawn(one, k) for k, one in enumerate(work)]
    gevent.joinall(jobs, timeout=30, raise_error=True)
    return [job.get(block=False) for job in jobs]


def assert_refused(calls):
    """Each of *calls*, made inside `uninterrupted`, is refused: a parked greenlet uses the file."""
    for i, call in enumerate(calls):
        try:
            call()
        except BlockingSwitchOutError as error:
            assert 'uninterrupted' in str(error)
        else:
            raise AssertionError(i)
