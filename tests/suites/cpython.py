"""Tests of CPython that open, read and write files, with the Python that runs this."""

from __future__ import annotations

import pathlib

from tests.suites.frame import Suite

RUNNER = pathlib.Path(__file__).with_name('regrtest.py')
MODULES = [
    'test_bufio', 'test_bz2', 'test_file', 'test_fileio', 'test_gzip', 'test_io', 'test_logging', 'test_lzma',
    'test_os', 'test_pathlib', 'test_posix', 'test_shutil', 'test_tarfile', 'test_tempfile',
    'test_univnewlines', 'test_zipfile',
]
# Each takes seconds: a test runs them in CI.
SHORT = ['test_bufio', 'test_file', 'test_fileio', 'test_univnewlines']

# Tests that hang wherever gevent patches threads, and are left out. They ask again and again whether another
# thread has done its work, and never sleep.
LOOPING = ['*test_config_queue_handler']

# Tests that hang with gevent alone, and are run with greenaio only.
HANGING = {
    '*test_optional_abilities': 'gevent alone: a thread that reads a pipe blocks the hub, and so its writer',
    '*SignalsTest.test_interrupted_*': 'gevent alone: a thread that reads a pipe blocks the hub',
    '*mp_queue*': 'gevent alone: a queue of multiprocessing blocks the hub',
    '*QueueListenerTest.test_no_messages*': 'gevent alone: a queue of multiprocessing blocks the hub',
}
LATE = 'gevent alone: its os.close closes a pipe later, when the loop runs'
HANDLER = ('greenaio: the loop waits for a full pipe, and a signal handler may run in the hub, which gets '
           'BlockingSwitchOutError')
DIFFERENCES = {
    **HANGING,
    '*SignalsTest.test_reentrant_write_*': HANDLER,
    '*TestPosixSpawn*': 'gevent alone: its loop may reap the child before the test waits for it',
    '*test_slow_close_from_thread': LATE,
    '*test_warn_on_dealloc_fd': LATE,
    '*FwalkTests.test_fd_leak': LATE,
    '*TestMkstempInner.test_choose_directory': 'gevent alone: its os.close binds where a class keeps it',
}


def command_of(module: str) -> list[str]:
    ignored = [argument for pattern in LOOPING for argument in ('--ignore', pattern)]
    return [str(RUNNER), *HANGING, '--', '--junit-xml={results}', *ignored, module]


SUITES = {
    'cpython': Suite({module: command_of(module) for module in MODULES}, patches=True, statuses=(0, 2),
                     differences=DIFFERENCES),
}
