"""How many system calls an ordinary operation takes."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import missing
from tests.support.processes import PROGRAMS, ROOT

# The path is looked up in the cache and its file looked at, before it is opened without waiting for a lease.
OPEN = ['openat2', 'statx', 'openat', 'fcntl', 'close']
# A file without a name would be freed by its close, which may wait.
CLOSE = ['statx', 'close']


@pytest.mark.parametrize('mode, calls', [
    ('rb', [*OPEN, 'newfstatat', 'preadv2', 'preadv2', *CLOSE]),
    ('r', [*OPEN, 'newfstatat', 'lseek', 'preadv2', 'preadv2', *CLOSE])])
def test_open_read_and_close_of_a_cached_file(disk_folder, mode, calls):
    """`io` takes 9 and 10: it looks at nothing beforehand, and asks for the size again to read."""
    if shutil.which('strace') is None:
        missing('needs strace')
    path, trace = (os.path.join(disk_folder, name) for name in ('data', 'trace'))
    with open(path, 'wb') as made:
        made.write(bytes(4096))
        os.fsync(made.fileno())
    subprocess.run(['strace', '-o', trace, sys.executable, PROGRAMS / 'open_read_close.py', path, mode],
                   env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True, timeout=60)
    with open(trace) as lines:
        made = [line.partition('(')[0] for line in lines]
    first, last = (i for i, name in enumerate(made) if name == 'getppid')
    assert [name for name in made[first + 1:last] if name not in ('mmap', 'munmap', 'brk')] == calls
