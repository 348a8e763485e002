"""Greenlets are killed on a frozen disk; their memory is used again, and the disk thaws."""

import gc
import os
import subprocess
import sys
from typing import Any

import gevent

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub

path, freeze, thaw = sys.argv[1:]
hub, engine = gevent.get_hub(), _hub.get_driver().engine
file = File(path, os.O_RDWR | os.O_DIRECT)
ours = aligned_buffer(4096)
ours[:] = b'w' * 4096
file.pwrite(ours, 0)


def read(i, seconds):
    ways = (lambda: file.preadv([aligned_buffer(4096)], 0), lambda: file.pread(4096, 0),
            lambda: file.preadv([aligned_buffer(512) for _ in range(8)], 0),
            lambda: file.preadv([bytearray(4096)], 4096 * i))
    with gevent.Timeout(seconds, False):     # type: ignore[arg-type]     # False: no error
        ways[i % 4]()
        raise AssertionError('the disk is not frozen')


rescue = subprocess.Popen(f'exec >&- 2>&-; sleep 20; {thaw}', shell=True)
subprocess.run(freeze, shell=True, check=True)
for how in ('kill', 'timeout', 'throw'):
    jobs = [gevent.spawn(read, i, 0.01 if how == 'timeout' else None) for i in range(8)]
    gevent.sleep(0.02)
    if how == 'kill':
        gevent.killall(jobs)
    elif how == 'throw':
        for job in jobs:
            hub.loop.run_callback(job.throw, gevent.GreenletExit)
    gevent.joinall(jobs, raise_error=True)
del jobs
gc.collect()
after: list[Any] = [aligned_buffer(size) for size in (512, 4096) for _ in range(100)]
after += [bytearray(size) for size in (512, 4096) for _ in range(100)]
after += [bytes([109]) * 4096 for _ in range(100)]
for memory in after[:400]:
    memory[:] = b'm' * len(memory)
assert len(engine.in_flight) + len(engine.lent) >= 6    # others had not begun
subprocess.run(thaw, shell=True, check=True)
while len(engine.in_flight) + len(engine.lent):
    gevent.sleep(0.001)
assert all(memory == b'm' * len(memory) for memory in after)
rescue.kill()
file.close()
