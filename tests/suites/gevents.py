"""gevent's own tests of files, processes, threads and patches, which an installed gevent has.

As with gevent's own runner, each module has a process of its own, in which it patches or not.
"""

from __future__ import annotations

from tests.suites.frame import LIBEV, LIBUV, PATCHED, PYTEST, Suite, pytest_of

MODULES = [
    'fileobject', 'greenio', 'os', 'close_backend_fd', 'makefile_ref',
    'subprocess', 'issue230', 'issue600', 'issue1686', 'issue2013', 'core_fork',
    'signal', 'backdoor', 'execmodules',
    'monkey', 'monkey_fork_atomic', 'monkey_futures_thread_fork', 'monkey_module_run', 'monkey_queue',
    'monkey_select', 'monkey_selectors',
    'threadpool', 'threading', 'threading_2', 'threading_fork_from_dummy', 'threading_monkey_in_thread',
    'threading_native_before_monkey', 'threading_shutdown_atexit',
]
# Programs without a test case: they end with 0.
SCRIPTS = [
    'issue6', 'monkey_builtins_future', 'monkey_hub_in_thread', 'monkey_logging', 'monkey_multiple_imports',
    'monkey_sigchld', 'monkey_sigchld_2', 'monkey_sigchld_3', 'monkey_sigchld_wakeup_fd',
    'subprocess_interrupted', 'subprocess_poll', 'threading_patched_local', 'threadpool_executor_patched',
]

SUITES = {
    'gevent': Suite(
        {**{f'test__{name}': pytest_of('--rootdir=.', '--pyargs', f'gevent.tests.test__{name}')
            for name in MODULES},
         **{f'test__{name}': ['-m', f'gevent.tests.test__{name}'] for name in SCRIPTS}},
        requires=[*PYTEST, 'psutil==7.2.2', 'requests==2.34.2'],
        loops=[LIBEV, LIBUV],
        modes={PATCHED: {'GREENAIO_PATCH': '1'},
               'FileObject': {'GREENAIO_PATCH': '0', 'GEVENT_FILE': 'greenaio.fileobject.FileObject'}},
        patches=True),
}
