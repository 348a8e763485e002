"""Open and stat paths into a mount whose server hangs; write a file on the disk where they begin."""

import os
import signal
import sys
import time
from collections.abc import Callable

import gevent

import greenaio
import greenaio.os
from greenaio import File, config

folder, mount, server, way = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4]
paths = []
for i in range(3 * config.threads):
    name = f'{folder}/{i}'
    if way == 'link':
        os.symlink(f'{mount}/data', name)
    elif way == 'chain':
        os.symlink(f'{name}-', name)
        os.symlink('../' * 20 + f'{mount}/data', f'{name}-')
    elif way == 'folder':
        os.symlink(mount, name)
        name += '/data'
    elif way == 'long link':
        os.symlink(f'{mount}/' + './' * 100 + 'data', name)
    else:
        name = os.path.relpath(f'{mount}/data', folder)
        name = f'{folder}/{name}'
    paths.append(name)
if 'long' in way:                       # it is not in memory
    os.system('sync; echo 2 >/proc/sys/vm/drop_caches')
os.kill(server, signal.SIGSTOP)
calls: list[Callable[[str], object]] = [
    lambda path: greenaio.os.open(path, os.O_RDONLY), greenaio.os.stat,
    lambda path: greenaio.open(path, 'rb'), lambda path: greenaio.os.open(path, os.O_RDWR | os.O_CREAT)]
waiting = [gevent.spawn(calls[i % 4], path) for i, path in enumerate(paths)]
try:
    gevent.sleep(0.2)
    began = time.monotonic()
    with gevent.Timeout(10), File(f'{folder}/other', os.O_WRONLY | os.O_CREAT) as file:
        file.pwrite(b'x', 0)
    assert not any(greenlet.ready() for greenlet in waiting)
    gevent.killall(waiting[::2])
finally:
    os.kill(server, signal.SIGCONT)
gevent.joinall(waiting[1::2], timeout=20, raise_error=True)
assert all(greenlet.ready() for greenlet in waiting)
for greenlet in waiting[1::2]:
    if isinstance(greenlet.value, int):
        os.close(greenlet.value)
os._exit(0)
