"""Use files in each way that takes another system call, and check what comes of it."""

import os
import shutil
import tempfile

import gevent

import greenaio


def use_files(folder):
    path = tempfile.mkdtemp(dir=folder) + '/file'
    with open(path, 'w') as file:
        file.write(250 * 'line\n')
    with open(path, 'r+') as file:
        assert file.readline() == 'line\n' and len(file.read()) == 1245 and file.tell() == 1250
    with greenaio.open(path, 'wb', direct=True) as file:
        file.write(bytes(100_001))
    with greenaio.File(path, os.O_RDWR | os.O_DIRECT) as direct, open(path, 'rb', 0) as raw:
        assert direct.pwrite(greenaio.aligned_buffer(4096), 4096) == 4096
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        jobs = [gevent.spawn(os.pread, fd, 4096, 4096 * i) for i in range(20)
                for fd in (raw.fileno(), direct.fileno())]
        gevent.joinall(jobs, raise_error=True, timeout=30)
        assert sum(len(job.get()) for job in jobs) == 40 * 4096
        assert len(os.read(raw.fileno(), 10)) == 10 and len(raw.read() or b'') == 99_991
    shutil.copyfile(path, path + '-copy')
    greenaio.copyfile(path, path + '-copy')
    os.chdir(os.path.dirname(path))
    assert os.stat('file-copy').st_size == os.path.getsize(path + '-copy') == 100_001
    assert not os.path.exists(path + '-no')
    pid = os.fork()                     # the hub of a child has an eventfd of its own
    if pid == 0:
        gevent.reinit()
        os._exit(gevent.spawn(os.stat, path).get(timeout=30).st_size % 256)
    assert os.waitpid(pid, 0)[1] >> 8 == 100_001 % 256
