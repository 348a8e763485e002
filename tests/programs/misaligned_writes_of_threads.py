"""Greenlets of several threads write misaligned parts of one file."""

import os
import sys
import threading

import gevent

from greenaio import File, aligned_buffer
from greenaio._files import ranges as _ranges

file = File(sys.argv[1], os.O_RDWR | os.O_DIRECT)
count = 60
done: list[int] = []


def work(i, with_hub):
    if with_hub:
        gevent.get_hub()
    for turn in range(count):
        assert file.pwrite(bytes([65 + i, 97 + turn % 26]) * 20, i * 40) == 40
        if turn % 10 == 5:
            assert file.pwrite(aligned_buffer(4096), 4096) == 4096
        done.append(i)


threads = [threading.Thread(target=work, args=(i, i % 2)) for i in range(1, 4)]
for thread in threads:
    thread.start()
work(0, True)
for thread in threads:
    thread.join(30)
assert len(done) == 4 * count, len(done)
assert not _ranges.held()
assert file.pwrite(b'after', 5) == 5
with open(sys.argv[1], 'rb') as written:
    data = written.read(160)
for i in range(1, 4):
    assert data[i * 40:i * 40 + 40] == bytes([65 + i, 97 + (count - 1) % 26]) * 20, data
