"""C code forks while a thread waits for a frozen disk to write a sector; the child writes it."""

import os
import subprocess
import sys
import threading
import time

import gevent

import greenaio
from tests.programs.forked_by_c import finish, libc

folder, freeze, thaw = sys.argv[1:]
path = os.path.join(folder, 'data')
with open(path, 'wb') as made:
    made.write(bytes(1 << 20))
    os.fsync(made.fileno())
file = greenaio.File(path, os.O_RDWR | os.O_DIRECT)
gevent.get_hub()
subprocess.run(freeze, shell=True, check=True)


def use():
    gevent.get_hub()
    file.pwrite(b'parent', 100)


threading.Thread(target=use, daemon=True).start()
time.sleep(0.3)
pid = libc.fork()
if pid == 0:
    file.pwrite(b'child', 200)
    os._exit(0)
subprocess.run(thaw, shell=True, check=True)
status = finish(pid)
print(status)
