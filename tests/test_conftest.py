"""A test that leaves something behind fails, and the next one finds nothing of it, nor of the shell."""

import os
import sys

from tests.support.processes import ROOT, run_in_shell

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
