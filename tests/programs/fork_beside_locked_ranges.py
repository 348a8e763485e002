"""A process forks while a thread has the lock of the sector ranges."""

import os
import sys
import threading
import time
import warnings

from greenaio._core import handle as _handle
from greenaio._files import ranges as _ranges

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
has_range, has_lock, is_over = threading.Event(), threading.Event(), threading.Event()
inode = _handle.inode_of(1, 2)


def with_range():
    _ranges.Range(inode, 0, 512)
    has_range.set()
    is_over.wait(50)


def with_lock():
    with _ranges._lock:
        has_lock.set()
        is_over.wait(50)


for work in with_range, with_lock:
    threading.Thread(target=work, daemon=True).start()
    (has_range if work is with_range else has_lock).wait(10)
child = os.fork()
if child == 0:
    os._exit(1 if _ranges.held() or _ranges._threads else 0)
for _ in range(1000):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    sys.exit('the child waits for ever')
assert status == 0
is_over.set()
