"""Each kind of work once: direct, buffered, text, streams, blocks, a thread with its own hub."""

import os
import sys
import threading

import gevent
import gevent.pool

import greenaio
import greenaio.block
import greenaio.os

folder = sys.argv[1]
path = os.path.join(folder, 'data')

with greenaio.File(path, os.O_RDWR | os.O_CREAT) as file:
    file.pwrite(bytes(range(256)) * 256, 0)
    file.fsync()
with greenaio.File(path, os.O_RDWR | os.O_DIRECT) as file:
    reads = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(16)]
    gevent.joinall(reads, raise_error=True)
    assert b''.join(read.get() for read in reads) == bytes(range(256)) * 256
    gevent.spawn(file.preadv, [greenaio.aligned_buffer(65536)], 0).kill()
    with gevent.Timeout(0, False):       # type: ignore[arg-type]     # False: no error
        file.fdatasync()
with greenaio.open(path, 'r+', encoding='latin-1') as file:
    assert file.read(3) == '\x00\x01\x02'
    file.write('…'.encode().decode('latin-1'))
with greenaio.open(path, 'rb', direct=True, prefetch=2) as file:
    assert len(file.read()) == 65536
greenaio.copyfile(path, path + '2')
with greenaio.block.BlockDevice(path + '2') as disk:
    disk.pwrite(b'x' * 4096, 0)
    disk.flush()
    assert disk.pread(4096, 0) == b'x' * 4096
fd = greenaio.os.open(path, os.O_RDONLY)
assert len(greenaio.os.read(fd, 100)) == 100
greenaio.os.close(fd)


def in_a_thread():
    with greenaio.File(path) as file:
        file.pread(10, 0)
    gevent.get_hub().destroy()


thread = threading.Thread(target=in_a_thread)
thread.start()
thread.join()
