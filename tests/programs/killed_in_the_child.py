"""A reader is killed in a forked child, which shares the position with the parent."""

import os
import sys
import time

import gevent

from greenaio.fileobject import FileIO
from tests.programs.forking import in_child, path, wait

content = os.pread(os.open(path, os.O_RDONLY), 1 << 22, 0)
shared = FileIO(path)
hold, release = (command.format(me=os.getpid()) for command in sys.argv[3:])
fd = shared._fd              # `fileno` would tell that the program may share it


def position():
    return os.lseek(fd, 0, os.SEEK_CUR)


def read_on():                          # all of it is in the page cache: it parks to let others have a turn
    return b''.join(iter(lambda: shared.read(500) or b'', b''))


def read_two():
    return shared.read(8192)


if sys.argv[2] == 'all':
    reader, wanted = gevent.spawn(read_on), content
    while position() == 0:
        gevent.sleep(0)
else:
    wanted = content[:8192]
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(100):                # until the kernel really forgets the second page
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 4096, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.system(hold)                 # or the thread is done before we look
        reader = gevent.spawn(read_two)
        gevent.sleep(0)
        if not reader.ready():
            break
        os.system(release)
        gevent.sleep(0.01)
    assert position() == 4096
assert not reader.ready()


def child():
    end = time.monotonic() + 20
    while position() != len(wanted) and time.monotonic() < end:
        time.sleep(0.01)                # until the parent is past it
    reader.kill()


pid = in_child(child)
assert reader.get() == wanted
at = position()
wait(pid)
assert position() == at == len(wanted)
os.system(release)
