"""Real reads and writes by the greenaio that is installed, on a disk and in memory:

    python tests/smoke.py [--threads]

Exits with 1 if it has no extension; with --threads, if it has one all the same.
"""

from __future__ import annotations

import errno
import os
import pathlib
import sys
import tempfile

import gevent

import greenaio
import greenaio.os

PAGE = 4096
DATA = bytes(range(256)) * 256          # 16 pages


def write_and_read(path: str, flags: int) -> None:
    try:
        file = greenaio.File(path, os.O_RDWR | os.O_CREAT | flags)
    except OSError as error:
        if flags & os.O_DIRECT and error.errno == errno.EINVAL:
            return                      # tmpfs before Linux 6.6
        raise
    with file:
        buffer = greenaio.aligned_buffer(len(DATA))
        buffer[:] = DATA
        assert file.pwrite(buffer, 0) == len(DATA)
        file.fdatasync()
        reads = [gevent.spawn(file.pread, PAGE, i * PAGE) for i in range(len(DATA) // PAGE)]
        gevent.joinall(reads, raise_error=True)
        assert b''.join(read.value for read in reads) == DATA
    with greenaio.open(path, 'rb') as stream:
        assert stream.read() == DATA
    assert greenaio.os.stat(path).st_size == len(DATA)


def main() -> int:
    house = pathlib.Path(greenaio.__file__).parent
    tree = pathlib.Path(__file__).resolve().parent.parent
    assert house != tree / 'greenaio', 'this is the source, not what was installed'
    assert (house / 'py.typed').exists()
    expected = '--threads' not in sys.argv
    if greenaio.native != expected:
        print(f'greenaio.native is {greenaio.native}', file=sys.stderr)
        return 1
    for folder in ('/var/tmp', '/dev/shm'):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for flags in (0, os.O_DIRECT):
                write_and_read(os.path.join(temporary, str(flags)), flags)
    print(f'greenaio {greenaio.__version__}, native {greenaio.native}, Python {sys.version.split()[0]}, '
          f'{gevent.config.loop.__module__}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
