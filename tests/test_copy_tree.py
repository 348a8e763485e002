"""examples/copy_tree.py, run as a user would, judged by filecmp and lstat."""

import errno
import filecmp
import os
import pathlib
import pty
import socket
import stat
import subprocess
import sys
import sysconfig
from functools import partial

import pytest

from tests.support.processes import EXAMPLES, run_example

copy_tree = partial(run_example, 'copy_tree', text=True)


def names_in(root):
    found = [os.path.relpath(os.path.join(folder, name), root)
             for folder, folders, names in os.walk(root) for name in folders + names]
    return ['.', *sorted(found)]


def assert_same(source, target):
    names = names_in(source)
    assert names_in(target) == names
    for name in names:
        one, other = os.path.join(source, name), os.path.join(target, name)
        facts, copied = os.lstat(one), os.lstat(other)
        assert copied.st_mode == facts.st_mode, name
        assert copied.st_mtime_ns == facts.st_mtime_ns, name
        if stat.S_ISLNK(facts.st_mode):
            assert os.readlink(other) == os.readlink(one)
        elif stat.S_ISREG(facts.st_mode):
            assert filecmp.cmp(one, other, shallow=False), name
    return len(names)


@pytest.mark.parametrize('part', ['asyncio', 'encodings', 'lib2to3', 'email'])
def test_pythons_own_library(folder, part):
    source, target = os.path.join(sysconfig.get_path('stdlib'), part), os.path.join(folder, 'copy')
    if not os.path.isdir(source):
        pytest.skip(f'this Python has no {part}')
    done = copy_tree(source, target)
    assert (done.returncode, done.stderr) == (0, '')
    count = int(done.stdout.split()[0])
    assert assert_same(source, target) > count > 30


def test_what_a_tree_may_hold(folder):
    source, target = pathlib.Path(folder, 'source'), pathlib.Path(folder, 'new', 'target')
    target.parent.mkdir()
    (source / 'closed').mkdir(parents=True)
    (source / 'empty').mkdir()
    (source / 'large').write_bytes(os.urandom(9 << 20))
    (source / 'nothing').touch()
    (source / 'program').write_bytes(b'#!')
    (source / 'program').chmod(0o4751)
    (source / b'not utf-8 \xff'.decode(errors='surrogateescape')).write_bytes(b'1')
    (source / 'new\nline').write_bytes(b'2')
    (source / 'closed' / 'file').write_bytes(b'3')
    (source / 'to file').symlink_to('large')
    (source / 'to folder').symlink_to('closed')
    (source / 'to above').symlink_to('..')
    (source / 'to nothing').symlink_to('/nowhere/at/all')
    for name in ('large', 'program', 'closed/file'):
        os.utime(source / name, ns=(10**18 + 1, 10**18 + 3))
    os.utime(source / 'to nothing', ns=(10**18 + 5, 10**18 + 7), follow_symlinks=False)
    (source / 'closed').chmod(0o555)
    for name in ('closed', 'empty', '.'):
        os.utime(source / name, ns=(10**18 + 9, 10**18 + 11))
    done = copy_tree(source, target)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == '10 files, 0 errors\n'
    assert_same(source, target)


def test_what_is_no_file_costs_its_own_line(folder):
    source, target = pathlib.Path(folder, 'source'), pathlib.Path(folder, 'target')
    source.mkdir()
    for name in ('a', 'z'):
        (source / name).write_bytes(b'content of ' + name.encode())
    os.mkfifo(source / 'pipe')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / 'socket'))
    done = copy_tree('source', 'target', cwd=folder)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        f"copy_tree.py: 'source/{name}' is no file, no folder and no symbolic link"
        for name in ('pipe', 'socket')]
    assert done.stdout == '4 files, 2 errors\n'
    assert sorted(os.listdir(target)) == ['a', 'z']
    assert (target / 'z').read_bytes() == b'content of z'


def test_file_that_vanishes_or_cannot_be_read_costs_its_own_line(folder, example, monkeypatch):
    source, target = os.path.join(folder, 'source'), os.path.join(folder, 'target')
    os.mkdir(source)
    for name in ('a', 'bad', 'gone', 'z'):
        pathlib.Path(source, name).write_bytes(b'content')
    walk, copyfile = example.walk, example.greenaio.copyfile

    def walk_while_one_vanishes(*args):
        for found in walk(*args):
            os.unlink(os.path.join(source, 'gone'))
            yield found

    def copy_from_a_bad_disk(source, *args, **kwargs):
        if source.endswith('bad'):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return copyfile(source, *args, **kwargs)

    monkeypatch.setattr(example, 'walk', walk_while_one_vanishes)
    monkeypatch.setattr(example.greenaio, 'copyfile', copy_from_a_bad_disk)
    copied = []
    count, failed = example.copy_tree(source, target, copied.append)
    assert count == 4
    assert sorted(failed) == [f'[Errno 2] No such file or directory: {os.path.join(source, "gone")!r}',
                              f'[Errno 5] Input/output error: {os.path.join(source, "bad")!r}']
    assert sorted(os.listdir(target)) == ['a', 'z']
    assert sum(copied) == 14


def test_what_is_no_oserror_costs_its_own_line_too(folder, example, monkeypatch):
    source, target = os.path.join(folder, 'source'), os.path.join(folder, 'target')
    os.mkdir(source)
    pathlib.Path(source, 'file').touch()

    def copy_without_a_thread(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(example.greenaio, 'copyfile', copy_without_a_thread)
    count, failed = example.copy_tree(source, target, print)
    assert (count, failed) == (1, [f'RuntimeError("can\'t start new thread"): {source + "/file"!r}'])


def test_tree_deeper_than_the_stack(disk_folder):
    try:
        for depth in range(1201):
            os.mkdir(f'{disk_folder}/source' + '/d' * depth)
        pathlib.Path(f'{disk_folder}/source' + '/d' * 1200, 'file').write_bytes(b'content')
        done = copy_tree('source', 'target', cwd=disk_folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, '1 files, 0 errors\n', '')
        assert pathlib.Path(f'{disk_folder}/target' + '/d' * 1200, 'file').read_bytes() == b'content'
    finally:                            # what the fixture would do with it recurses
        subprocess.run(['rm', '-r', f'{disk_folder}/source', f'{disk_folder}/target'], check=True)


def test_target_above_a_link_is_where_the_kernel_finds_it(folder):
    source, elsewhere = pathlib.Path(folder, 'source'), pathlib.Path(folder, 'else', 'where')
    (source / 'sub').mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    pathlib.Path(folder, 'link').symlink_to(elsewhere)
    assert copy_tree('source', 'link/../new', cwd=folder).returncode == 0
    assert_same(source, elsewhere.parent / 'new')
    assert not os.path.exists(os.path.join(folder, 'new'))


def test_progress_adds_up_to_what_was_copied(disk_folder, example):
    source, target = os.path.join(disk_folder, 'source'), os.path.join(disk_folder, 'target')
    os.mkdir(source)
    sizes = [0, 1, 100_000, 4 << 20, (9 << 20) + 1]
    for i, size in enumerate(sizes):
        pathlib.Path(source, str(i)).write_bytes(os.urandom(size))
    steps = []
    assert example.copy_tree(source, target, steps.append) == (5, [])
    assert sum(steps) == sum(sizes)
    assert all(step > 0 for step in steps)
    assert len(steps) >= 6                  # the largest is told of in parts


def test_progress_bar_on_a_terminal_only(disk_folder):
    source = os.path.join(sysconfig.get_path('stdlib'), 'json')
    assert '\x1b' not in copy_tree(source, os.path.join(disk_folder, 'plain')).stdout
    parent, child = pty.openpty()
    try:
        done = subprocess.run([sys.executable, EXAMPLES / 'copy_tree.py', source, f'{disk_folder}/shown'],
                              stdout=child, stderr=subprocess.PIPE, timeout=60,
                              env={**os.environ, 'TERM': 'xterm'})
        shown = os.read(parent, 65536)
    finally:
        os.close(parent)
        os.close(child)
    assert (done.returncode, done.stderr) == (0, b'')
    assert b' files, 0 errors' in shown
    pytest.importorskip('rich')
    assert b'\x1b' in shown


@pytest.mark.parametrize('args', [[], ['only one'], ['missing', 'new'], ['file', 'new'], ['source', 'file'],
                                  ['source', 'source'], ['source', 'source/new'], ['source', 'link/new'],
                                  ['source', 'there'], ['source', 'dangling'], ['--what', 'source', 'new']])
def test_bad_arguments(disk_folder, args):
    for name in ('source', 'there'):
        os.mkdir(os.path.join(disk_folder, name))
    pathlib.Path(disk_folder, 'file').touch()
    os.symlink('source', os.path.join(disk_folder, 'link'))
    os.symlink('nowhere', os.path.join(disk_folder, 'dangling'))
    before = names_in(disk_folder)
    done = copy_tree(*args, cwd=disk_folder)
    assert done.returncode == 2
    assert 'usage: ' in done.stderr
    assert 'Traceback' not in done.stderr
    assert names_in(disk_folder) == before


def test_root_is_not_copied_into_itself(disk_folder, example, monkeypatch):
    monkeypatch.setattr(example, 'copy_tree', lambda *args: (0, []))    # if it is, then not here
    monkeypatch.setattr(sys, 'argv', ['copy_tree.py', '/', os.path.join(disk_folder, 'new')])
    with pytest.raises(SystemExit, match='2'):
        example.main()
