"""Disks that die, shrink, fill up and lie about their size under requests in flight."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import threading
import time

import gevent
import pytest
from test_block import SHUTDOWN, loop_device, unmount

from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from tests.support import missing
from tests.support.disks import MIB, FreezableDisk, pattern
from tests.support.processes import aio_nr, run, run_program, run_python

GONE = {errno.EIO, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN,
        errno.EINVAL}           # nbdfuse, of what it could not send any more


def errnos(jobs):
    """What each of *jobs* ended with: 0 or an errno. All have to end."""
    gevent.joinall(jobs, timeout=30)
    assert all(job.ready() for job in jobs)
    for job in jobs:
        if job.exception is not None and not isinstance(job.exception, OSError):
            raise job.exception
    return [job.exception.errno if job.exception else 0 for job in jobs]


@pytest.fixture(autouse=True)
def nothing_stays_in_flight():
    hub = gevent.get_hub()
    hub.exception_stream = None             # greenlets fail here, one and all
    yield
    del hub.exception_stream                # is sys.stderr again, whatever that is then
    engine = _hub.get_driver().engine
    for _ in range(1000):
        if not len(engine.in_flight) + len(engine.lent):
            break
        gevent.sleep(0.005)
    engine._check()
    assert len(engine.in_flight) == len(engine.lent) == len(engine.pending) == 0


@pytest.mark.parametrize('direct', [True, False])
@pytest.mark.parametrize('death', ['server', 'mount'])
def test_disk_dies_in_flight(death, direct, tmp_path):
    if os.geteuid() != 0 or shutil.which('nbdfuse') is None:
        missing('needs root and nbdfuse')
    disk = FreezableDisk(str(tmp_path), size='16M')
    try:
        file = File(disk.path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        file.pread(4096, 0)
        disk.freeze()
        jobs = [gevent.spawn(file.preadv, [aligned_buffer(4096)], MIB * i) for i in range(1, 9)]
        if direct:
            jobs += [gevent.spawn(file.pwrite, aligned_buffer(4096), 4096 * i) for i in range(4)]
        gevent.sleep(0.1)
        assert not any(job.ready() for job in jobs)
        if death == 'server':
            os.kill(disk.pid, signal.SIGKILL)
        else:                           # says that it is busy, but ends the connection
            subprocess.run(['umount', '-f', os.path.dirname(disk.path)], capture_output=True)
        assert set(errnos(jobs)) <= GONE
        assert set(errnos([gevent.spawn(file.pread, 4096, 12 * MIB)])) <= GONE
        with contextlib.suppress(OSError):      # as os.close says, too
            file.close()
    finally:
        disk.close()


@pytest.mark.parametrize('kind', ['ext4', 'xfs'])
def test_file_system_shuts_down_in_flight(kind, tmp_path):
    if shutil.which(f'mkfs.{kind}') is None:
        missing(f'needs mkfs.{kind}')
    disk, mount = tmp_path / 'disk', tmp_path / 'mnt'
    with open(disk, 'wb') as file:
        file.truncate(512 * MIB)
    mount.mkdir()
    with loop_device(disk) as loop:
        run(f'mkfs.{kind}', '-q', loop)
        run('mount', loop, mount)
        try:
            with File(mount / 'data', os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
                file.pwrite(aligned_buffer(MIB), 0)
                jobs = [gevent.spawn(file.pwrite, aligned_buffer(4096), 4096 * i) for i in range(64)]
                jobs += [gevent.spawn(file.fdatasync) for _ in range(4)]
                gevent.sleep(0)
                folder = os.open(mount, os.O_RDONLY)
                fcntl.ioctl(folder, SHUTDOWN, struct.pack('I', 2))
                os.close(folder)
                assert set(errnos(jobs)) <= {0, errno.EIO}
                assert errnos([gevent.spawn(file.pwrite, aligned_buffer(4096), 0),
                               gevent.spawn(file.fsync)]) == [errno.EIO] * 2
        finally:
            unmount(mount)


def test_file_shrinks_under_reads(folder):
    """What is returned was there: short, but never stale or made up."""
    path = os.path.join(folder, 'data')
    content = pattern(4 * MIB)
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    stop, short = threading.Event(), 0

    def shrink():
        generator = random.Random(1)
        fd = os.open(path, os.O_RDWR)
        while not stop.is_set():
            size = generator.randrange(0, 4 * MIB)
            os.ftruncate(fd, size)
            os.pwrite(fd, content[size:], size)
        os.close(fd)

    thread = threading.Thread(target=shrink)
    thread.start()
    try:
        with File(path, os.O_RDONLY | os.O_DIRECT) as direct, File(path, os.O_RDONLY) as cached:
            def read(file, seed):
                nonlocal short
                generator = random.Random(seed)
                for _ in range(100):
                    offset = generator.randrange(0, 4 * MIB, 4096)
                    data = file.pread(65536, offset)
                    short += len(data) < min(65536, 4 * MIB - offset)
                    found = memoryview(data[:len(data) // 8 * 8]).cast('Q')
                    wanted = memoryview(content[offset:offset + len(found) * 8]).cast('Q')
                    # Between truncate and write, the pages read as zeros.
                    assert all(a == b or a == 0 for a, b in zip(found, wanted))
            gevent.joinall([gevent.spawn(read, file, seed) for seed in range(8) for file in (direct, cached)],
                           raise_error=True)
    finally:
        stop.set()
        thread.join()
    assert short


def test_loop_device_whose_backing_shrinks(disk_folder):
    path = os.path.join(disk_folder, 'backing')
    with open(path, 'wb') as file:
        file.write(pattern(4 * MIB))
    with loop_device(path) as name, File(name, os.O_RDWR | os.O_DIRECT) as file:
        os.truncate(path, MIB)
        found = errnos([gevent.spawn(file.preadv, [aligned_buffer(4096)], offset)
                        for offset in range(0, 4 * MIB, 64 * 1024)])
        assert found == [0] * 16 + [errno.EIO] * 48


def test_end_of_a_device(disk_folder):
    path = os.path.join(disk_folder, 'backing')
    with open(path, 'wb') as file:
        file.truncate(MIB)
    with loop_device(path) as name, File(name, os.O_RDWR | os.O_DIRECT) as file:
        assert len(file.pread(8192, MIB - 4096)) == 4096
        assert file.pread(4096, MIB) == b''
        assert file.pwrite(aligned_buffer(8192), MIB - 4096) == 4096
        assert errnos([gevent.spawn(file.pwrite, aligned_buffer(4096), MIB)]) == [errno.ENOSPC]


def test_sectors_of_4_kib(disk_folder):
    """What does not fit them goes through memory of ours: nobody sees an EINVAL."""
    path = os.path.join(disk_folder, 'backing')
    content = pattern(MIB)
    with open(path, 'wb') as file:
        file.write(content)
    with loop_device(path, '-b', '4096') as name, File(name, os.O_RDWR | os.O_DIRECT) as file:
        assert file.pread(512, 512) == content[512:1024]
        assert file.pwrite(b'x' * 512, 4096 + 512) == 512
        assert file.pread(8192, 0) == content[:4608] + b'x' * 512 + content[5120:8192]


def test_sync_fails_once_for_each_fd(tmp_path):
    """The kernel says it once to each open file: so does greenaio, and takes nothing back by trying again."""
    if os.geteuid() != 0 or shutil.which('losetup') is None:
        missing('needs root and losetup')
    run('mount', '-t', 'tmpfs', '-o', 'size=2M', 'greenaio-test', tmp_path)
    try:
        with open(tmp_path / 'backing', 'wb') as file:
            file.truncate(16 * MIB)
        with loop_device(tmp_path / 'backing') as name:
            first, second = File(name, os.O_RDWR), File(name, os.O_RDWR)
            for offset in range(0, 8 * MIB, MIB):
                first.pwrite(bytes(range(256)) * 4096, offset)
            for file in (first, second):
                assert errnos([gevent.spawn(file.fsync)])[0] in (errno.EIO, errno.ENOSPC)
                assert errnos([gevent.spawn(file.fsync)]) == [0]
                file.close()
    finally:
        unmount(tmp_path)


def test_full_queue_costs_no_cpu(held_disk):
    depth = _hub.get_driver().engine.context.depth
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        held_disk.hold()
        jobs = [gevent.spawn(file.pread, 4096, i % 1024 * 4096) for i in range(4 * depth)]
        gevent.sleep(0.1)
        before = time.process_time()
        gevent.sleep(1)
        used = time.process_time() - before
        held_disk.release()
        assert errnos(jobs) == [0] * len(jobs)
        assert used < 0.05


@pytest.mark.parametrize('end, status', [
    ('sys.exit(3)', 3), ('os._exit(4)', 4), ('os.kill(os.getpid(), 15); gevent.sleep(5)', -15),
    ('os.kill(os.getpid(), 9)', -9),
    ('threading.Thread(target=work, daemon=True).start(); time.sleep(0.1)', 0),
    ('raise SystemExit(5)', 5)])
def test_end_of_the_process_in_flight(held_disk, end, status):
    """Right exit status, nothing printed, no context left."""
    contexts = aio_nr()
    held_disk.hold()
    thaw = threading.Timer(1, held_disk.release)        # no process ends before its requests have
    thaw.start()
    try:
        done = run_python(f'''
            import gevent, os, sys, threading, time
            from greenaio import File
            file = File({held_disk.file!r}, os.O_RDONLY | os.O_DIRECT)
            def work():
                jobs = [gevent.spawn(file.pread, 4096, 4096 * i) for i in range(20)]
                gevent.sleep(0.05)
                return jobs
            jobs = work()
            {end}
        ''', check=False)
    finally:
        thaw.join()
    assert (done.returncode, done.stderr) == (status, '')
    end = time.monotonic() + 10         # the kernel frees them a little later
    while aio_nr() > contexts and time.monotonic() < end:
        time.sleep(0.01)
    assert aio_nr() <= contexts


def test_no_memory_for_a_context():
    """Then threads do it. What is left to the process is enough for those, and less than its 3.7 MiB."""
    done = run_python('''
        import logging, os, resource, tempfile
        logging.disable()
        os.environ['GREENAIO_DEPTH'] = '60000'
        import gevent, greenaio
        from greenaio import File
        from greenaio._core import hub as _hub
        with tempfile.NamedTemporaryFile(dir='/var/tmp') as data:
            data.write(bytes(1 << 20)); data.flush(); os.fsync(data.fileno())
            with open('/proc/self/statm') as statm:
                pages = int(statm.read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (3 << 20), resource.RLIM_INFINITY))
            with File(data.name, os.O_RDONLY | os.O_DIRECT) as file:
                print(len(file.pread(4096, 0)), _hub.get_driver().native)
    ''')
    assert done.stdout.split() == ['4096', 'False']


def test_more_buffers_than_a_call_takes(folder):
    """IOV_MAX is 1024: one more is EINVAL, as in os, and nothing is written."""
    with File(os.path.join(folder, 'data'), os.O_RDWR | os.O_CREAT) as file:
        parts = [bytes([i % 256]) * 3 for i in range(1025)]
        for call, buffers in ((file.pwritev, parts), (file.preadv, [bytearray(3) for _ in range(1025)])):
            assert errnos([gevent.spawn(call, buffers, 0)]) == [errno.EINVAL]
        assert os.fstat(file.fileno()).st_size == 0
        assert file.pwritev(parts[:1024], 0) == 3072
        got = [bytearray(3) for _ in range(1024)]
        assert file.preadv(got, 0) == 3072
        assert got == [bytearray(part) for part in parts[:1024]]


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
@pytest.mark.parametrize('freezable', ['fuse', 'ext4'], indirect=True)
def test_what_was_killed_harms_nothing_that_comes_after(loop, freezable):
    """Killed on a frozen disk, forgotten, collected; the same sizes are allocated anew, and it thaws."""
    path = freezable.path
    if os.path.isdir(path):
        path = os.path.join(path, 'data')
    with open(path, 'r+b' if os.path.exists(path) else 'wb') as data:
        data.write(b'w' * MIB)
        os.fsync(data.fileno())
    run_program('killed_on_frozen_disk', path, *freezable.commands(), env={'GEVENT_LOOP': loop})
