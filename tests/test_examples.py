"""The examples, run as a user would, judged by somebody else's program."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import gevent
import pytest
from conftest import missing, pattern

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'


def checksum(*paths, cwd=None):
    return subprocess.run([sys.executable, EXAMPLES / 'checksum.py', *paths], capture_output=True,
                          cwd=cwd, timeout=300)


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


def test_ticker_goes_on_while_a_tree_is_hashed():
    """In one process: the example's own functions, with a ticking greenlet beside them."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import checksum as example
    finally:
        sys.path.remove(str(EXAMPLES))
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
