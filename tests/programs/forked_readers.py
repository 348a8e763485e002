"""Forked processes read records at one position. Print how many records more than there are were taken."""

import gevent.monkey

gevent.monkey.patch_all()
import greenaio.monkey

greenaio.monkey.patch_all()             # gevent finds the plugin only where greenaio is installed
import os
import sys

import gevent

gevent.get_hub()
path, records = sys.argv[1], 4000
with open(path, 'wb') as file:
    file.write(b''.join(b'%015d\n' % i for i in range(records)))
fd = os.open(path, os.O_RDONLY)
children = []
for k in range(3):
    pid = os.fork()
    if pid == 0:
        gevent.sleep(0.01)
        taken = []
        while data := os.read(fd, 16):
            taken.append(data)
        with open(f'{path}.{k}', 'wb') as file:
            file.write(b''.join(taken))
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
print(sum(os.path.getsize(f'{path}.{k}') for k in range(3)) // 16 - records)
