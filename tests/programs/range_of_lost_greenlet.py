"""A greenlet that holds a sector range can never go on; others write there."""

import os
import sys
import threading
import warnings

import gevent

from greenaio import File, aligned_buffer
from greenaio._files import ranges as _ranges

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
path, how = sys.argv[1:]
file = File(path, os.O_RDWR | os.O_DIRECT)
begun, go_on = threading.Event(), threading.Event()


def other():
    writers = [gevent.spawn(file.pwrite, b'odd', 7 + i * 4096) for i in range(300)]
    while not _ranges.held():
        gevent.sleep(0)
    begun.set()
    if how == 'destroy':
        gevent.get_hub().destroy()
    else:
        go_on.wait()                    # in this thread, so that nothing goes on
        gevent.joinall(writers)


thread = threading.Thread(target=other)
thread.start()
begun.wait()
child = 0
if how == 'fork':
    child = os.fork()
else:
    thread.join()
if child:
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
else:
    for data, offset in ((b'odd', 7), (aligned_buffer(4096), 8192)):
        assert gevent.spawn(file.pwrite, data, offset).get(timeout=10) == len(data)
    assert not _ranges.held()
    os._exit(0)
