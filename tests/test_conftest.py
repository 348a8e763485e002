"""A test that leaves something behind fails, and the next one finds nothing of it, nor of the shell."""

import importlib.util
import os
import signal
import subprocess
import sys

from tests.support import missing
from tests.support.disks import is_mounted
from tests.support.processes import ROOT, run_in_shell, run_program

LEAKING = '''
import os
import gevent
import greenaio, greenaio.os

before, left = set(), []

def files():
    return {name for name in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{name}')}

def test_leaks_files(tmp_path):
    before.update(files())
    path = tmp_path / 'file'
    left.extend([open(path, 'w'), greenaio.open(path, 'w'), greenaio.File(path)])
    for _ in range(3):
        os.open('/dev/null', os.O_RDONLY)

def test_finds_them_closed():
    assert [file.closed for file in left] == [True] * 3
    assert files() == before

def test_leaves_a_greenlet_that_waits(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    left.append(gevent.spawn(greenaio.os.open, tmp_path / 'fifo', os.O_RDONLY))
    gevent.sleep(0.01)

def test_finds_a_hub_that_works(tmp_path):
    with greenaio.File(tmp_path / 'file', os.O_RDWR | os.O_CREAT) as file:
        assert file.pwrite(b'data', 0) == 4
        file.fsync()
    assert len(files()) == len(before)
'''


IGNORED = '''
import subprocess

def test_child_ignores_neither_ctrl_c_nor_a_hangup():
    status = subprocess.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout
    ignored, = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith('SigIgn:')]
    assert ignored & 0b11 == 0
'''


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as stat:
            return stat.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False


def run_tests(folder, text, before=''):
    """Run a file of tests, in a shell that first does *before*; return the finished process."""
    path = folder / 'test_inner.py'
    path.write_text(text)
    return run_in_shell(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'tests.conftest', '-p', 'no:cacheprovider',
         '-c', os.devnull, '--rootdir', folder, '--basetemp', folder / 'inner', path],
        '', before=before, env={'PYTHONPATH': str(ROOT)})


def test_leaking_test_fails_and_not_the_next_one(tmp_path):
    done = run_tests(tmp_path, LEAKING)
    told = [line.split(' - ')[0].split('::test_')[1] for line in done.stdout.splitlines()
            if line.startswith(('ERROR ', 'FAILED '))]
    assert told == ['leaks_files', 'leaves_a_greenlet_that_waits'], done.stdout
    assert '\n4 passed, 2 errors in ' in done.stdout, done.stdout


def test_tests_in_the_background_do_not_pass_ignored_signals_on(tmp_path):
    """As a shell has it behind ``nohup`` and before ``&``."""
    done = run_tests(tmp_path, IGNORED, before='trap "" INT HUP')
    assert done.returncode == 0, done.stdout


def test_tests_that_hang_in_a_stopped_server_end(tmp_path):
    """A process in such a call can't be killed before the server goes on, or is gone."""
    if os.geteuid() != 0:
        missing('needs root')
    if importlib.util.find_spec('mfusepy') is None:
        missing('needs mfusepy')
    folder, mount = tmp_path / 'folder', tmp_path / 'mount'
    for path in folder, mount:
        path.mkdir()
    (folder / 'file').touch()
    try:
        done = run_program('hangs_in_a_stopped_server', folder, mount, check=False)
    finally:
        if is_mounted(str(mount)):
            subprocess.run(['umount', '-l', mount], check=True)
    assert -done.returncode in (signal.SIGABRT, signal.SIGKILL), done.stderr
    assert 'hangs: one that hangs' in done.stderr
    assert not is_running(int(done.stdout))
