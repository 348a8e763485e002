"""A parked greenlet changes sectors of a file that an uninterrupted one writes."""

from tests.programs.patched import assert_refused  # it patches, and so comes first

# isort: split
import contextlib
import os

import gevent
from gevent.event import Event

import greenaio
from greenaio._core import handle as _handle
from greenaio._files import ranges as _ranges

with open('data', 'wb') as file:
    file.write(bytes(8192))
file = greenaio.open('data', 'r+b', buffering=0, direct=True)
fd, leave = os.open('data', os.O_RDWR), Event()
source = os.open('source', os.O_RDWR | os.O_CREAT)
os.write(source, b'x')
st = os.fstat(fd)


def change():
    held = _ranges.Range(_handle.inode_of(st.st_dev, st.st_ino), 0, 4096)
    leave.wait()
    held.let_go()


changer = gevent.spawn(change)
gevent.sleep(0)
calls = [lambda: os.pwrite(fd, b'x', 4095), lambda: os.pwritev(fd, [b'x', b'y'], 0),
         lambda: os.write(fd, b'x'), lambda: os.ftruncate(fd, 8192), lambda: os.posix_fallocate(fd, 0, 10),
         lambda: os.copy_file_range(source, fd, 1, offset_dst=0), lambda: os.sendfile(fd, source, 0, 1),
         lambda: file.write(b'x'), lambda: file.truncate(8192)]
with greenaio.uninterrupted():
    assert_refused(calls)
    assert os.pwrite(fd, b'x', 4096) == 1 and os.pread(fd, 1, 0) == bytes(1)    # elsewhere, and a read
    assert os.sendfile(source, fd, 0, 1) == 1                                   # and a copy from there
    for wrong in (lambda: os.pwrite(fd, 'x', 0),            # type: ignore[arg-type]
                  lambda: os.pwrite(fd, b'x')):             # type: ignore[call-arg]
        with contextlib.suppress(TypeError):
            wrong()
leave.set()
changer.join()
with greenaio.uninterrupted():
    for call in calls:
        call()
file.close()
os.close(fd)
