"""Fixtures, and the watchdog over the tests."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import shutil
import signal
import tempfile

import gevent
import pytest

from greenaio._core import hub as _hub
from greenaio._core import loop as _loop
from greenaio._files import route as _route
from tests.support import missing
from tests.support.disks import MIB, FreezableDisk, HeldDisk, pattern, real_disk, temporary_folder
from tests.support.kernel import ScriptedContext
from tests.support.leftovers import close_files, open_files, unfinished_work
from tests.support.processes import EXAMPLES
from tests.support.watchdog import leave_watchdog, start_watchdog, tell_watchdog


def pytest_sessionstart():
    # The background of a shell ignores Ctrl-C, and nohup hangups: what the tests start would inherit that.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    start_watchdog()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()                         # each test collects, and need not look at this again


def pytest_runtest_logstart(nodeid):
    tell_watchdog('test', nodeid)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    # The process may hang while it ends, too, and then says where. By now pytest says it no more.
    leave_watchdog()
    faulthandler.enable()


@pytest.fixture(params=['disk', 'memory'])
def folder(request):
    """A folder on a disk, and once more one in memory."""
    with temporary_folder(request.param) as name:
        yield name


@pytest.fixture
def disk_folder():
    with tempfile.TemporaryDirectory(dir=real_disk(), prefix='greenaio-test-') as name:
        yield name


@pytest.fixture
def data_file(folder):
    path = os.path.join(folder, 'data')
    with open(path, 'wb') as file:
        file.write(pattern(MIB))
        file.flush()
        os.fsync(file.fileno())     # or O_DIRECT finds dirty pages, and io_submit waits for them
    return path


@pytest.fixture
def driver():
    """A Driver of this hub over a ScriptedContext, which is ``driver.engine.context``. To it no time passes,
    or a slow machine would end a pass where no test wants it, unless that is set free."""
    context = ScriptedContext()
    context.frozen_at = context.now()
    driver = _loop.HubDriver(gevent.get_hub(), context, depth=64)
    yield driver
    driver._check()
    driver.close()


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test: nothing in flight, no greenlet that waits, no fd more than before. The test that
    leaves something fails, and the next one finds it gone. What the tests before taught a device, as to
    refuse RWF_NOWAIT, is forgotten."""
    gevent.get_hub()
    _hub.get_driver()
    _route.forgive()
    before = open_files()
    yield
    gc.collect()
    driver = _hub.get_driver()
    for _ in range(400):
        # Who waits for what is done already has yet to be woken.
        if not unfinished_work(driver) and len(open_files()) <= len(before):
            break
        gevent.sleep(0.005)
    driver._check()
    unfinished, leaked, after = unfinished_work(driver), {}, open_files()
    if len(after) > len(before):
        leaked = {fd: path for fd, path in after.items() if before.get(fd) != path}
        close_files(leaked)
    if unfinished:
        gevent.get_hub().destroy(destroy_loop=True)     # the next test makes another
    assert not unfinished
    assert not leaked


@pytest.fixture
def example(request, monkeypatch):
    """The example that the test's module is about, imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.module.__name__.removeprefix('test_'))


@pytest.fixture
def held_disk(disk_folder):
    """A file of 4 MiB on a real disk that can be held."""
    if os.geteuid() != 0:
        missing('needs root')
    if not HeldDisk.is_possible():
        missing('needs the blkio controller of cgroup v1')
    path = os.path.join(disk_folder, 'held')
    with open(path, 'wb') as file:
        file.write(pattern(4 * MIB))
        os.fsync(file.fileno())
    disk = HeldDisk(path)
    yield disk
    disk.close()


@pytest.fixture(params=['fuse', 'ext4', 'xfs'])
def freezable(request, tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    for tool in ('nbdkit', 'nbdfuse', 'losetup', 'mkfs.xfs', 'mkfs.ext4'):
        if shutil.which(tool) is None:
            missing(f'needs {tool}')
    disk = FreezableDisk(str(tmp_path), None if request.param == 'fuse' else request.param)
    yield disk
    disk.close()
