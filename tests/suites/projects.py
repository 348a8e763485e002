"""Projects whose suites are pytest's: each a row."""

from __future__ import annotations

import os
import pathlib

from tests.suites.frame import PYTEST, Suite, pytest_of

LITMUS = pathlib.Path(__file__).with_name('litmus.py')
DJANGO = 'django==5.2.19'

SUITES = {
    'flask': Suite(
        {'tests': pytest_of('tests')}, 'flask==3.1.3',
        [*PYTEST, 'flask==3.1.3', 'werkzeug==3.1.9', 'asgiref==3.13.0', 'python-dotenv==1.2.4']),
    # Watchdog's thread reads inotify: in a program that gevent has patched it stops all else.
    'werkzeug': Suite(
        {'tests': pytest_of('--deselect=tests/test_serving.py::test_reloader_sys_path[watchdog]', 'tests')},
        'werkzeug==3.1.9',
        [*PYTEST, 'werkzeug==3.1.9', 'cryptography==50.0.2', 'ephemeral-port-reserve==1.1.4',
         'pytest-timeout==2.4.0', 'watchdog==7.1.0']),
    'whitenoise': Suite(
        {'tests': pytest_of('tests')}, 'https://github.com/evansd/whitenoise@6.12.0',
        [*PYTEST, 'whitenoise==6.12.0', 'brotli==1.2.1', 'requests==2.34.2', DJANGO]),
    # Without coverage and processes side by side, which its configuration asks for.
    'diskcache': Suite(
        {'tests': pytest_of('-c', os.devnull, '--rootdir=.', 'tests')},
        'https://github.com/grantjenks/python-diskcache@v5.6.3', [*PYTEST, DJANGO]),
    'zodb': Suite(
        {'tests': ['-m', 'zope.testrunner', '--test-path=src', '-a', '1000', '-vv', '--xml={results}']},
        'zodb==6.4', ['ZODB==6.4', 'manuel==1.13.0', 'zope.testing==6.2', 'zope.testrunner==8.3']),
    'pypiserver': Suite(
        {'tests': pytest_of('tests')}, 'https://github.com/pypiserver/pypiserver@v2.4.1',
        [*PYTEST, 'pypiserver==2.4.1', 'passlib==1.7.4', 'webtest==3.0.7', 'httpx==0.28.1', 'build==1.6.1',
         'setuptools==80.9.0', 'wheel==0.45.1', 'twine==7.0.0']),
    # Its own test of litmus is one test, of all that litmus does.
    'wsgidav': Suite(
        {'tests': pytest_of('--ignore=tests/test_litmus.py', 'tests'), 'litmus': [str(LITMUS), '{results}']},
        'https://github.com/mar10/wsgidav@v4.3.5',
        [*PYTEST, 'wsgidav==4.4.0', 'cheroot==11.1.2', 'requests==2.34.2', 'webtest==3.0.7', 'lxml==6.1.3'],
        commands={'litmus': 'litmus'}),
}
