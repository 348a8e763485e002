"""A process forks while blocks are written behind; its child must not write them."""

import os
import sys
import warnings

import gevent

warnings.simplefilter('ignore', DeprecationWarning)
from greenaio.fileobject import open as open_file

path, n = sys.argv[1], 8 << 20
file = open_file(path, 'wb', buffering=0, direct=True)
file.write(b'x' * n)
file.flush()                    # the next are overwrites, which native AIO takes
file.seek(0)


def write():
    file.write(b'A' * n)
    file.flush()


writer = gevent.spawn(write)
while not file._behind._blocks:
    gevent.sleep(0)
    assert not writer.ready()
r, w = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(r, 1)               # the parent has written all, and B over it
    gevent.reinit()
    gevent.get_hub().exception_stream = None
    try:
        writer.join(5)
        os._exit(0 if type(writer.exception) is OSError else 1)
    finally:
        os._exit(2)
writer.get()
file.seek(0)
file.write(b'B' * n)
file.close()
os.write(w, b'x')
assert os.waitpid(pid, 0)[1] == 0
with open(path, 'rb') as file:
    data = file.read()
assert data.count(b'B') == n, [data.count(one) for one in (b'A', b'B', bytes(1))]
