"""What a test leaves behind fails that test, and is gone before the next one."""

import os
import subprocess
import sys

from tests.support.processes import ROOT

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


def test_leaking_test_fails_and_not_the_next_one(tmp_path):
    path = tmp_path / 'test_leaking.py'
    path.write_text(LEAKING)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'tests.conftest', '-p', 'no:cacheprovider',
         '-c', os.devnull, '--rootdir', tmp_path, '--basetemp', tmp_path / 'inner', path],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=60)
    told = [line.split(' - ')[0].split('::test_')[1] for line in done.stdout.splitlines()
            if line.startswith(('ERROR ', 'FAILED '))]
    assert told == ['leaks_files', 'leaves_a_greenlet_that_waits'], done.stdout
    assert '\n4 passed, 2 errors in ' in done.stdout, done.stdout
