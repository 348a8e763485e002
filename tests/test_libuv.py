"""The tests of everything that touches a loop once more, under gevent's other one."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support import missing
from tests.support.processes import side_by_side

HERE = pathlib.Path(__file__).parent
OTHER = 'libev-cext' if os.environ.get('GEVENT_LOOP') == 'libuv' else 'libuv'


@pytest.fixture(scope='module')
def runs(request):
    def run(name):
        return subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', HERE / f'{name}.py'],
            env={**os.environ, 'GEVENT_LOOP': OTHER, 'IS_OTHER_LOOP': '1'}, cwd=HERE.parent,
            capture_output=True, text=True, timeout=500)

    if os.environ.get('IS_OTHER_LOOP'):
        pytest.skip('this is the other loop')
    if importlib.util.find_spec('cffi') is None:
        missing('cffi, which libuv needs, is not installed')
    return side_by_side(request, 'test_on_the_other_loop', run)


@pytest.mark.parametrize('name', ['test_hub', 'test_file', 'test_fork', 'test_races', 'test_stress',
                                  'test_streams', 'test_monkey', 'test_write_ahead_log', 'test_stats',
                                  'test_odd_files', 'test_multiprocessing', 'test_uninterrupted'])
def test_on_the_other_loop(request, runs, name):
    done = runs[request.node.name].result()
    assert done.returncode == 0, done.stdout[-5000:]


def test_loop_is_the_one_asked_for():
    import gevent
    wanted = os.environ.get('GEVENT_LOOP', 'libev').split('-')[0]
    assert wanted in type(gevent.get_hub().loop).__module__
