"""Where the extension was built, no operation on a file takes a Python thread: these are few, and shared."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import gevent
import pytest

import greenaio
from tests.support import missing
from tests.support.disks import is_mounted
from tests.support.processes import run


@pytest.fixture
def loopback(tmp_path):
    """The server of a mount whose every stat it is asked for, and the mount."""
    if os.geteuid() != 0:
        missing('needs root')
    if importlib.util.find_spec('mfusepy') is None:
        missing('needs mfusepy')
    for name in ('folder', 'mount'):
        (tmp_path / name).mkdir()
    mount = str(tmp_path / 'mount')
    server = os.path.join(os.path.dirname(__file__), 'loopback.py')
    process = subprocess.Popen([sys.executable, server, tmp_path / 'folder', mount])
    end = time.monotonic() + 20
    while not is_mounted(mount) and time.monotonic() < end:
        time.sleep(0.01)
    yield process, mount
    process.send_signal(signal.SIGCONT)
    run('umount', mount)
    process.wait(10)


@pytest.mark.parametrize('mode', ['rb', 'ab'])
def test_file_object_of_a_fifo_asks_no_server(loopback, mode):
    """`io` would ask how large it is, and where it ends."""
    server, mount = loopback
    os.mkfifo(f'{mount}/fifo')
    fd = os.open(f'{mount}/fifo', os.O_RDWR)
    server.send_signal(signal.SIGSTOP)
    try:
        with gevent.Timeout(10):
            file = greenaio.open(fd, mode, 0, closefd=False)
        assert (file.fileno(), file.seekable(), file.mode) == (fd, False, mode)
        file.close()
    finally:
        server.send_signal(signal.SIGCONT)
        os.close(fd)
