"""Where the extension was built, no operation on a file takes a Python thread: these are few, and shared."""

import ctypes
import gc
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import gevent
import pytest

import greenaio
from greenaio import aligned_buffer
from greenaio._core import hub as _hub
from greenaio._core.pools import pools
from greenaio._files import calls as _calls
from greenaio.block import BlockDevice
from tests.support import missing
from tests.support.disks import MIB, is_mounted, make_scattered, temporary_folder
from tests.support.processes import run, run_program


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


def assert_no_thread_asked_for(folder):
    assert run_program('no_python_thread', folder).stdout == '0\n'


@pytest.mark.parametrize('kind', ['disk', 'memory'])
def test_no_operation_on_a_file_starts_a_python_thread(kind):
    with temporary_folder(kind) as folder:
        assert_no_thread_asked_for(folder)


def test_no_operation_on_a_file_of_a_server_starts_a_python_thread(loopback):
    _, mount = loopback
    assert_no_thread_asked_for(mount)


def test_only_the_portable_build_has_calls_made_by_python_threads():
    """The pool has methods of objects that are not files, too."""
    found = {path.stem for path in pathlib.Path(greenaio.__file__).parent.rglob('*.py*')
             if path.suffix in ('.py', '.pyx')
             and re.search(r'pool import .*\bcall\b|pool\.call\(|ThreadPool\(', path.read_text())}
    assert found == {'pool', 'portable', 'portable_file'}


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


# What a thread may still write ---------------------------------------------------------------------

def wait_until_begun(is_asked):
    """Wait until a call was asked for, as *is_asked* tells, and a thread has begun with each call. A kill
    withdraws a call that no thread has begun with."""
    with gevent.Timeout(10):
        while not is_asked() or any(pool.queued for pool in pools()):
            gevent.sleep(0.001)


def assert_killed_call_keeps_its_memory(call, thaw):
    """The disk of *call* stands still until *thaw* is called."""
    engine = _hub.get_driver().engine
    killed = gevent.spawn(call)
    try:
        wait_until_begun(lambda: engine.lent.count)
        killed.kill(timeout=1)
        assert killed.ready() and engine.lent.count == 1
        del killed
        gc.collect()
        fresh = [aligned_buffer(nbytes) for nbytes in (4096, 32768) for _ in range(64)]
        for buffer in fresh:
            buffer[:] = b'\xee' * len(buffer)
    finally:
        # Also if the test has failed, because the file is closed next, and its server would not answer.
        thaw()
    with gevent.Timeout(20):
        while engine.lent.count:
            gevent.sleep(0.01)
    assert all(buffer == b'\xee' * len(buffer) for buffer in fresh)


@pytest.mark.parametrize('freezable', ['ext4'], indirect=True)
def test_killed_while_it_asks_for_blocks_keeps_its_memory(freezable):
    path = os.path.join(freezable.path, 'image')
    make_scattered(path)
    freezable.remount()
    with BlockDevice(path, readonly=True) as device:
        freezable.freeze()
        assert_killed_call_keeps_its_memory(lambda: device.block_status(8 * MIB, 0),
                                            lambda: subprocess.run(freezable.commands()[1], shell=True,
                                                                   check=True))


def test_killed_in_an_ioctl_keeps_its_memory(loopback):
    server, mount = loopback
    ask = 0xC0101282            # for 16 bytes, there and back
    with greenaio.File(f'{mount}/file', os.O_RDWR | os.O_CREAT) as file:
        assert _calls.ioctl(file.fileno(), ask, b'x' * 16) == bytes(16)
        server.send_signal(signal.SIGSTOP)
        assert_killed_call_keeps_its_memory(lambda: _calls.ioctl(file.fileno(), ask, bytes(16)),
                                            lambda: server.send_signal(signal.SIGCONT))


def test_killed_reader_leaves_its_buffer_to_others(loopback, tmp_path):
    """A buffer that owns no memory may be freed with its greenlet, and the thread returns later."""
    server, mount = loopback
    (tmp_path / 'folder' / 'file').write_bytes(b'x' * 64)
    memory = ctypes.create_string_buffer(64)
    from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
    from_memory.restype = ctypes.py_object
    view = from_memory(ctypes.c_void_p(ctypes.addressof(memory)), ctypes.c_ssize_t(64), 0x200)
    begun = []

    def read():
        begun.append(file.begin_at_position(True, [view]))
        begun[0].get()

    with greenaio.File(f'{mount}/file') as file:
        server.send_signal(signal.SIGSTOP)
        try:
            reader = gevent.spawn(read)
            wait_until_begun(lambda: begun)
            reader.kill()
            assert not begun[0].withdraw()
        finally:
            server.send_signal(signal.SIGCONT)
        assert begun[0].get() == 64
        assert memory.raw == bytes(64)
