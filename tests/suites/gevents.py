"""gevent's own tests of files, processes, threads and patches: an installed gevent has them."""

from __future__ import annotations

from tests.suites.frame import LIBEV, LIBUV, PATCHED, PYTEST, Suite, pytest_of

MODULES = [
    'test__fileobject', 'test__greenio', 'test__os', 'test__close_backend_fd', 'test__subprocess',
    'test__subprocess_interrupted', 'test__subprocess_poll',
    'test__monkey', 'test__threadpool',
]

SUITES = {
    'gevent': Suite(
        {module: pytest_of('--rootdir=.', '--pyargs', f'gevent.tests.{module}') for module in MODULES},
        requires=[*PYTEST, 'psutil==7.2.2', 'requests==2.34.2'],
        loops=[LIBEV, LIBUV],
        modes={PATCHED: {'GREENAIO_PATCH': '1'},
               'FileObject': {'GREENAIO_PATCH': '0', 'GEVENT_FILE': 'greenaio.fileobject.FileObject'}},
        patches=True),
}
