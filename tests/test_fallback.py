"""Without the extension, as after an install with no compiler, everything works by threads. Without Linux,
nothing does."""

import os
import pathlib
import shutil

import pytest

import greenaio
from tests.support.processes import HIDE_EXTENSION, ROOT, run_python

HOUSE = pathlib.Path(greenaio.__file__).parent

WITHOUT = HIDE_EXTENSION + '''
import errno, gevent, greenaio, greenaio.os, os
assert not greenaio.native
'''


def test_file_and_os_work_by_threads(data_file):
    run_python(WITHOUT + '''
path = sys.argv[1]
with greenaio.File(path, os.O_RDWR) as file:
    assert file.pread(16, 8) == (1).to_bytes(8, 'little') + (2).to_bytes(8, 'little')
    buffers = [bytearray(4), greenaio.aligned_buffer(12)]
    assert file.preadv(buffers, 8) == 16
    assert file.pwrite(b'x' * 16, 0) == file.pwritev([b'x' * 8, b'x' * 8], 0) == 16
    file.fsync()
    file.fdatasync()
    assert file.pread(16, 0) == b'x' * 16
    fd = file.fileno()
    assert greenaio.os.pread(fd, 4, 0) == b'xxxx'
    assert greenaio.os.preadv(fd, buffers, 0) == greenaio.os.pwritev(fd, buffers, 0) == 16
    assert greenaio.os.pwrite(fd, b'y', 0) == 1
    greenaio.os.fsync(fd)
    greenaio.os.fdatasync(file)
    assert file.alignment == 1 and not file.direct and file.device == os.stat(path).st_dev
    ticks = []
    def tick():
        while True:
            ticks.append(1)
            gevent.sleep(0)
    ticker = gevent.spawn(tick)
    reads = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(100)]
    gevent.joinall(reads, raise_error=True)
    assert len(ticks) > 1
    ticker.kill()
assert file.closed
fd = greenaio.os.open(path, os.O_RDWR)
assert greenaio.os.read(fd, 4) == b'yxxx'
assert greenaio.os.write(fd, b'zz') == greenaio.os.writev(fd, [b'z', b'z']) == 2
assert greenaio.os.readv(fd, [bytearray(3)]) == 3
assert os.lseek(fd, 0, os.SEEK_CUR) == 11
greenaio.os.ftruncate(fd, 100)
greenaio.os.posix_fallocate(fd, 0, 200)
assert greenaio.os.fstat(fd) == greenaio.os.stat(path) == os.stat(path)
assert greenaio.os.copy_file_range(fd, fd, 50, 0, 150) == 50
greenaio.os.close(fd)
try:
    greenaio.File('/no/such/file')
except FileNotFoundError as error:
    assert error.filename == '/no/such/file'
fd = os.open(path, os.O_RDONLY)
greenaio.os.close(fd)
try:
    greenaio.os.pread(fd, 1, 0)
except OSError as error:
    assert error.errno == errno.EBADF
''', data_file)


@pytest.mark.parametrize('forks', [False, True])
def test_socket_is_closed_under_sendfile_without_the_extension_too(data_file, forks):
    """A loop that watches a closed number aborts the process."""
    run_python(WITHOUT + '''
import socket
def use():
    try:
        return greenaio.os.sendfile(one.fileno(), source, 0, 99)
    except OSError as error:
        return error.errno
source = os.open(sys.argv[1], os.O_RDONLY)
one, other = socket.socketpair()
one.setblocking(False)
try:
    while one.send(bytes(1 << 16)):
        pass
except BlockingIOError:
    pass
user = gevent.spawn(use)
gevent.sleep(0.1)
pid = os.fork() if sys.argv[2] == 'True' else -1
if pid == 0:
    gevent.reinit()
if pid <= 0:
    greenaio.os.close(one.fileno())
    is_open = os.path.lexists(f'/proc/self/fd/{one.fileno()}')      # then who waits goes on to use it
    gevent.sleep(0.1)
    os._exit((user.value, is_open) != ((errno.EBADF, False) if pid == 0 else (None, True)))
assert os.waitpid(pid, 0)[1] == 0
''', data_file, forks)


def test_o_direct_reads_bytes_by_threads(data_file):
    run_python(WITHOUT + '''
with greenaio.File(sys.argv[1], os.O_RDONLY | os.O_DIRECT) as file:
    for read in (file.pread, lambda n, offset: greenaio.os.pread(file.fileno(), n, offset)):
        assert read(8192, 4096)[:16] == (512).to_bytes(8, 'little') + (513).to_bytes(8, 'little')
        assert read(4096, 1 << 30) == b''
        for n, offset in ((-1, 0), (4096, -1)):
            try:
                read(n, offset)
            except OSError as error:
                assert error.errno == errno.EINVAL
            else:
                raise AssertionError(n)
''', data_file)


@pytest.mark.parametrize('args', [(-1,), (10, 3), (10, 0)])
def test_bad_sizes_are_refused_without_the_extension_too(args):
    done = run_python(WITHOUT + f'greenaio.aligned_buffer{args!r}', check=False)
    assert 'ValueError' in done.stderr


def test_forgotten_file_warns_without_the_extension_too(data_file):
    done = run_python(WITHOUT + 'import warnings; warnings.simplefilter("always")\n'
                      'greenaio.File(sys.argv[1])', data_file, check=False)
    assert 'ResourceWarning: unclosed file' in done.stderr


def test_extension_was_built():
    """Optional for users, not for the tests."""
    assert greenaio.native


@pytest.mark.parametrize('name', ['_files/calls', '_files/file', '_core/handle', '_core/memory'])
def test_extension_that_lacks_a_module_is_not_used_at_all(tmp_path, name):
    """A compiler may refuse one module, or a clone may have one of an earlier build."""
    left_out, = HOUSE.glob(f'{name}.*.so')
    shutil.copytree(HOUSE, tmp_path / 'greenaio', copy_function=os.symlink,
                    ignore=shutil.ignore_patterns(left_out.name))
    run_python('''
import sys
sys.path.insert(0, sys.argv[1])
import io, logging, os, warnings
printed = io.StringIO()
logging.basicConfig(stream=printed)
with warnings.catch_warnings(record=True) as caught:
    import greenaio, greenaio.block, greenaio.monkey, greenaio.os, greenaio.wsgi
assert greenaio.__file__.startswith(sys.argv[1]) and not greenaio.native
assert not caught and not printed.getvalue(), (caught, printed.getvalue())
path = os.path.join(sys.argv[1], 'data')
with open(path, 'wb') as file:
    file.write(b'abc')
with greenaio.File(path) as file:
    assert file.pread(9, 1) == b'bc'
greenaio.monkey.patch_all()
with open(path, 'rb') as file:
    assert file.read(9) == b'abc' and os.pread(file.fileno(), 9, 2) == b'c'
with greenaio.block.BlockDevice(path, direct=False) as device:
    assert bytes(device.pread(2, 0)) == b'ab'
assert greenaio.stats().by_thread > 0
from greenaio._commands.doctor import examine_machine
assert sys.argv[2] in examine_machine().extension
''', tmp_path, name.rpartition('/')[2])


ELSEWHERE = 'greenaio is for Linux only, and this is darwin'


def test_import_on_another_system_fails_in_one_line():
    run_python('''
import sys
sys.platform = 'darwin'
for name in 'greenaio', 'greenaio.os', 'greenaio.monkey':
    try:
        __import__(name)
    except ImportError as error:
        assert str(error) == sys.argv[1]
    else:
        raise AssertionError(name)
''', ELSEWHERE)


def test_install_on_another_system_fails_in_one_line():
    done = run_python("""
import runpy
import sys
import setuptools.command.build_ext
sys.platform = 'darwin'
runpy.run_path(sys.argv[1])
""", ROOT / 'setup.py', check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, '', ELSEWHERE + '\n')
