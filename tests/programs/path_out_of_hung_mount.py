"""Open and stat paths that lead out of a mount whose server hangs, to a disk that does not."""

import os
import sys

import gevent

import greenaio
import greenaio.os
from greenaio import File

folder, mount, again, way = sys.argv[1:]
paths = []
for i in range(3 * greenaio.config.threads):
    with open(f'{folder}/{i}', 'w'):
        pass
    names = {'link': f'{mount}/link-{i}',
             'folder of it': f'{mount}/folder-{i}/{os.path.relpath(folder, mount + "/a")}',
             'by number': f'link-{i}', 'working directory': f'link-{i}'}
    paths.append(f'{names[way]}/{i}')
fd = os.open(mount, os.O_PATH) if way == 'by number' else None
if way == 'working directory':
    os.chdir(mount)
with open(again, 'w'):
    waiting = [gevent.spawn(greenaio.os.stat, path, dir_fd=fd) if i % 2 else
               gevent.spawn(greenaio.os.open, path, os.O_RDWR, dir_fd=fd) for i, path in enumerate(paths)]
try:
    gevent.sleep(0.5)
    with gevent.Timeout(10), File(f'{folder}/other', os.O_WRONLY | os.O_CREAT) as file:
        file.pwrite(b'x', 0)
    assert not any(greenlet.ready() for greenlet in waiting)
finally:
    os.unlink(again)
for path, greenlet in zip(paths, waiting):
    found = greenlet.get(timeout=20)
    assert os.path.samestat(found if isinstance(found, os.stat_result) else os.fstat(found),
                            os.stat(path, dir_fd=fd))
os._exit(0)
