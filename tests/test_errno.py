"""Every errno arrives as the system call gives it, whichever way it came: ERRNO of the matrix.

A FUSE file system fails as it is told; a loop device on its file takes the errors through the block layer
to native AIO, as far as that has words for them. What ``os`` says on the same fd is the answer.
"""

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import time

import gevent
import pytest

import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import hub as _hub
from greenaio.block import BlockDevice
from tests.support import missing
from tests.support.processes import run, run_python

ERRNOS = ['EACCES', 'EAGAIN', 'EBUSY', 'EDQUOT', 'EFBIG', 'EIO', 'ENODATA', 'ENOLINK', 'ENOMEM',
          'ENOSPC', 'EPERM', 'EROFS', 'ESTALE', 'ETIMEDOUT']
BLOCK = 4096


class Faulty:
    def __init__(self, folder):
        self.control, self.mount = os.path.join(folder, 'control'), os.path.join(folder, 'faulty')
        self.path = os.path.join(self.mount, 'data')
        os.mkdir(self.mount)
        self.work()
        server = os.path.join(os.path.dirname(__file__), 'faulty.py')
        self._server = subprocess.Popen([sys.executable, server, self.mount, self.control])
        end = time.monotonic() + 10
        while not os.path.exists(self.path) and time.monotonic() < end:
            time.sleep(0.01)

    def fail(self, code):
        with open(self.control, 'w') as file:
            file.write(''.join(f'{operation} {code}\n' for operation in ('read', 'write', 'fsync')))

    def work(self):
        open(self.control, 'w').close()

    def close(self):
        self.work()
        run('umount', self.mount)
        self._server.wait(10)


@pytest.fixture(scope='module')
def faulty(tmp_path_factory):
    if os.geteuid() != 0:
        missing('needs root')
    if importlib.util.find_spec('mfusepy') is None:
        missing('needs mfusepy')
    disk = Faulty(str(tmp_path_factory.mktemp('errno')))
    yield disk
    disk.close()


@pytest.fixture(scope='module')
def faulty_block_device(faulty):
    if shutil.which('losetup') is None:
        missing('needs losetup')
    loop = run('losetup', '--direct-io=on', '-f', '--show', faulty.path).strip()
    yield loop
    run('losetup', '-d', loop)


def outcome(call):
    try:
        call()
    except OSError as error:
        return type(error), error.errno, error.strerror
    return None


def calls_of(module, fd):
    """Operations with the signatures of ``os``."""
    memory = aligned_buffer(BLOCK)
    return {'pread': lambda: module.pread(fd, BLOCK, 0),
            'preadv': lambda: module.preadv(fd, [memory], BLOCK),
            'pwrite': lambda: module.pwrite(fd, memory, 0),
            'pwritev': lambda: module.pwritev(fd, [memory, memory], BLOCK),
            'fsync': lambda: module.fsync(fd),
            'fdatasync': lambda: module.fdatasync(fd)}


def forget(fd):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize('flags', [0, os.O_DIRECT], ids=['buffered', 'direct'])
@pytest.mark.parametrize('code', ERRNOS)
def test_errno_of_a_file_system(faulty, code, flags):
    with File(faulty.path, os.O_RDWR | flags) as file:
        fd = file.fileno()
        faulty.fail(code)
        try:
            theirs, ours = calls_of(os, fd), calls_of(greenaio.os, fd)
            for name, call in theirs.items():
                forget(fd)
                wanted = outcome(call)
                assert wanted is not None, name
                forget(fd)
                assert outcome(ours[name]) == wanted, name
                forget(fd)
                memory = aligned_buffer(BLOCK)
                arguments = {'pread': (BLOCK, 0), 'preadv': ([memory], 0), 'pwrite': (memory, 0),
                             'pwritev': ([memory], 0)}
                with pytest.raises(wanted[0]) as caught:
                    getattr(file, name)(*arguments.get(name, ()))
                assert (caught.value.errno, caught.value.strerror) == wanted[1:]
                assert caught.value.filename == faulty.path
        finally:
            faulty.work()
        file.pread(BLOCK, 0)
        file.pwrite(aligned_buffer(BLOCK), 0)
        file.fsync()


@pytest.mark.parametrize('code', [code for code in ERRNOS if code != 'EAGAIN'])    # that is tried for ever
def test_errno_of_a_block_device_by_native_aio(faulty, faulty_block_device, code):
    with File(faulty_block_device, os.O_RDWR | os.O_DIRECT) as file:
        engine, fd = _hub.get_driver().engine, file.fileno()
        faulty.fail(code)
        try:
            theirs, ours = calls_of(os, fd), calls_of(greenaio.os, fd)
            before = engine.submitted
            theirs['pread'] = theirs['preadv']          # os.pread takes memory that O_DIRECT does not
            for name, call in theirs.items():
                wanted = outcome(call)
                assert wanted is not None, name
                assert outcome(ours[name]) == wanted, name
            assert engine.submitted - before >= len(ours)
            with pytest.raises(OSError) as caught:
                file.pread(BLOCK, 0)
            assert caught.value.filename == faulty_block_device
        finally:
            faulty.work()
        assert file.pread(BLOCK, 0) == bytes(BLOCK)


def test_errno_without_the_extension(faulty):
    faulty.fail('ENOSPC')
    try:
        run_python('''
            import errno, os, greenaio
            assert not greenaio.native
            with greenaio.File(sys.argv[1], os.O_RDWR | os.O_DIRECT) as file:
                memory = greenaio.aligned_buffer(4096)
                for call in (lambda: file.pread(4096, 0), lambda: file.pwrite(memory, 0), file.fsync):
                    try:
                        call()
                    except OSError as error:
                        assert (error.errno, error.filename) == (errno.ENOSPC, sys.argv[1]), error
                    else:
                        raise AssertionError
        ''', faulty.path, extension=False)
    finally:
        faulty.work()


def test_one_that_fails_harms_no_other(faulty, folder):
    """A disk that fails and one that does not, in one hub."""
    healthy = os.path.join(folder, 'healthy')
    with open(healthy, 'wb') as file:
        file.write(bytes(BLOCK))
    with File(faulty.path, os.O_RDWR | os.O_DIRECT) as bad, File(healthy) as good:
        faulty.fail('EIO')
        try:
            reads = [gevent.spawn(outcome, lambda file=file: file.pread(BLOCK, 0))
                     for file in [bad, good] * 20]
            gevent.joinall(reads, timeout=20)
            assert [read.value and read.value[0] for read in reads] == [OSError, None] * 20
        finally:
            faulty.work()


def test_reads_of_one_greenlet_fail_each_for_itself(faulty, faulty_block_device):
    with BlockDevice(faulty_block_device) as device:
        faulty.fail('EIO')
        try:
            found = list(device.pread_each([(BLOCK, i * BLOCK) for i in range(8)]))
            assert [(type(one), one.errno, one.filename) for one in found] == [
                (OSError, errno.EIO, faulty_block_device)] * 8
        finally:
            faulty.work()
        assert [bytes(one) for one in device.pread_each([(BLOCK, 0), (BLOCK, BLOCK)])] == [bytes(BLOCK)] * 2
