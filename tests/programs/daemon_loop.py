"""A daemon closes all numbers, those of the loop too, opens files on them, and forks. The child works."""

import os
import sys

import gevent

import greenaio.os
from greenaio import File

path = f'{sys.argv[1]}/data'
with open(path, 'wb') as data:
    data.write(bytes(1 << 20))
greenaio.os.stat(path)
os.closerange(3, 4096)
files = [os.open('/etc/hostname', os.O_RDONLY) for _ in range(32)]
pid = os.fork()
if pid == 0:
    gevent.reinit()                     # which gives the loop new numbers
    with gevent.Timeout(10), File(path, os.O_RDWR | os.O_DIRECT) as file:
        readers = [gevent.spawn(file.pread, 4096, 4096 * i) for i in range(8)]
        gevent.joinall(readers, raise_error=True)
        assert [len(reader.get()) for reader in readers] == [4096] * 8
        file.pwrite(b'x' * 100, 1)      # by a thread
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
os._exit(0)                             # the loop's own numbers are gone as well
