"""Files on a disk that is frozen while its one thread reads."""

import errno
import os
import subprocess
import sys

import gevent

import greenaio.os

folder, freeze, thaw = sys.argv[1:]


def made(name, nbytes=65536):
    fd = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(nbytes))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def outcome(call, *args):
    try:
        with gevent.Timeout(0.2):
            call(*args)
        return 'done'
    except gevent.Timeout:
        return 'timeout'
    except OSError as error:
        return errno.errorcode[error.errno or 0]


cold, large, victim = made('cold'), made('large', 16 << 20), made('victim')
subprocess.run(freeze, shell=True, check=True)
reader = gevent.spawn(greenaio.os.pread, cold, 4096, 0)     # the one thread of the disk
gevent.sleep(0.1)
