"""examples/checksum.py on what makes trouble in a tree; test_examples has the rest."""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'


def checksum(*paths, cwd=None):
    return subprocess.run([sys.executable, EXAMPLES / 'checksum.py', *paths], capture_output=True, text=True,
                          cwd=cwd, timeout=60)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import checksum
    return checksum


def test_what_is_no_file_costs_its_own_line(folder):
    for name in ('a', 'z'):
        pathlib.Path(folder, name).write_bytes(b'content')
    os.mkfifo(os.path.join(folder, 'pipe'))
    done = checksum('.', cwd=folder)
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
        done = checksum('top', cwd=disk_folder)
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout.split()[0] == hashlib.sha256(b'content').hexdigest()
    finally:                            # what the fixture would do with it recurses
        subprocess.run(['rm', '-r', f'{disk_folder}/top'], check=True)
