"""examples/checksum.py, run as a user would, judged by somebody else's program."""

import fcntl
import hashlib
import os
import pathlib
import pty
import shutil
import struct
import subprocess
import sys
import sysconfig
import termios
from functools import partial

import gevent
import pytest

from tests.support import missing
from tests.support.disks import pattern
from tests.support.processes import EXAMPLES, run_example

checksum = partial(run_example, 'checksum', timeout=300)


def judge(sums, cwd=None):
    if not shutil.which('sha256sum'):
        missing('sha256sum is not installed')
    return subprocess.run(['sha256sum', '-c', '--strict', '--quiet'], input=sums, cwd=cwd,
                          capture_output=True)


def test_checksums_of_pythons_own_encodings_satisfy_sha256sum():
    done = checksum(os.path.join(sysconfig.get_path('stdlib'), 'encodings'))
    assert done.returncode == 0, done.stderr
    assert done.stderr == b''
    assert done.stdout.count(b'\n') > 100
    verdict = judge(done.stdout)
    assert verdict.returncode == 0, verdict.stdout[-2000:]


@pytest.mark.parametrize('size', [0, 1, 511, 512, 4096, 262143, 262144, 262145, 3 * 262144,
                                  5 * 262144 + 4096, 2_000_001])
def test_every_size_of_file(folder, size):
    path = os.path.join(folder, 'file')
    with open(path, 'wb') as file:
        file.write(pattern(2_000_008)[:size])
    done = checksum(path)
    assert done.returncode == 0, done.stderr
    assert judge(done.stdout).returncode == 0


def test_unreadable_file_costs_its_own_line(folder):
    for name in ('a', 'z'):
        pathlib.Path(folder, name).write_bytes(b'x' * 1000)
    done = checksum('a', 'missing', 'z', cwd=folder)
    assert done.returncode == 1
    assert done.stderr == b'checksum.py: missing: No such file or directory\n'
    assert done.stdout.count(b'\n') == 2
    assert judge(done.stdout, cwd=folder).returncode == 0


def test_strange_names_are_written_as_sha256sum_reads_them(folder):
    for name in ('with space', 'new\nline', 'back\\slash', b'not utf-8 \xff'):
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        with open(path, 'wb') as file:
            file.write(b'content')
    done = checksum('.', cwd=folder)
    assert done.returncode == 0, done.stderr
    verdict = judge(done.stdout, cwd=folder)
    assert verdict.returncode == 0, verdict.stderr


def test_ticker_goes_on_while_a_tree_is_hashed(example):
    """In one process: the example's own functions, with a ticking greenlet beside them."""
    ticks = []

    def tick():
        while True:
            ticks.append(1)
            gevent.sleep(0.001)

    ticker = gevent.spawn(tick)
    folder = os.path.join(sysconfig.get_path('stdlib'), 'json')
    paths = list(example.walk([folder], []))
    greenlets = [gevent.spawn(example.checksum, path) for path in paths]
    gevent.joinall(greenlets, raise_error=True)
    ticker.kill()
    assert len(paths) > 4
    assert all(len(greenlet.value) == 64 for greenlet in greenlets)
    assert len(ticks) > 2


def test_what_is_no_file_costs_its_own_line(folder):
    for name in ('a', 'z'):
        pathlib.Path(folder, name).write_bytes(b'content')
    os.mkfifo(os.path.join(folder, 'pipe'))
    done = checksum('.', cwd=folder, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, 'checksum.py: ./pipe: Not a regular file\n')
    assert [line.split()[1] for line in done.stdout.splitlines()] == ['./a', './z']


@pytest.mark.parametrize('size', [100_000, 262144 + 5, 5 * 262144])
def test_short_read_is_not_the_end(folder, example, size):
    """As in /proc, where they come by the page, and at any time."""
    path, content = os.path.join(folder, 'file'), os.urandom(size)
    pathlib.Path(path).write_bytes(content)
    for at_most in (4096, 99_999, 262143):
        with example.File(path) as file:
            short = ShortReads(file, at_most)
            assert b''.join(map(bytes, example.chunks(short))) == content
    assert example.checksum(path) == hashlib.sha256(content).hexdigest()


class ShortReads:
    def __init__(self, file, at_most):
        self.file, self.at_most = file, at_most

    def preadv(self, buffers, offset):
        return self.file.preadv([buffers[0][:self.at_most]], offset)


def test_file_of_proc(example):
    path = '/proc/kallsyms'
    with open(path, 'rb') as file:
        assert example.checksum(path) == hashlib.sha256(file.read()).hexdigest()


def test_order_is_that_of_the_names_and_no_link_is_followed(folder, example):
    for name in ('b/2', 'b/1', 'a/1', 'a/c/1', '2', '1'):
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.symlink('a', os.path.join(folder, 'to folder'))
    os.symlink('1', os.path.join(folder, 'to file'))
    failed = []
    assert list(example.walk([folder, 'missing'], failed)) == [
        *(os.path.join(folder, name) for name in ('1', '2', 'a/1', 'a/c/1', 'b/1', 'b/2')), 'missing']
    assert failed == []


def test_tree_deeper_than_the_stack(disk_folder):
    try:
        for depth in range(1201):
            os.mkdir(f'{disk_folder}/top' + '/d' * depth)
        pathlib.Path(f'{disk_folder}/top' + '/d' * 1200, 'file').write_bytes(b'content')
        done = checksum('top', cwd=disk_folder, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout.split()[0] == hashlib.sha256(b'content').hexdigest()
    finally:                            # what the fixture would do with it recurses
        subprocess.run(['rm', '-r', f'{disk_folder}/top'], check=True)


def test_progress_fits_the_terminal_whatever_a_file_is_called(folder):
    """A name may move the cursor."""
    pathlib.Path(folder, 'a\nb\x1b[31m' + 'x' * 100).touch()
    parent, child = pty.openpty()
    try:
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 40, 0, 0))
        done = subprocess.run([sys.executable, EXAMPLES / 'checksum.py', folder], stdout=subprocess.DEVNULL,
                              stderr=child, timeout=60)
        shown = os.read(parent, 65536).decode().split('\r\x1b[K')
    finally:
        os.close(parent)
        os.close(child)
    assert done.returncode == 0 and len(shown) == 3
    assert all(text.isprintable() and len(text) < 40 for text in shown)
