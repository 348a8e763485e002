"""The short form of ``python -m tests.suites cpython``."""

import os
import subprocess
import sys

import pytest

from tests.suites.cpython import SHORT, command_of
from tests.suites.frame import ROOT, count, differing, read_junit


@pytest.mark.parametrize('module', SHORT)
def test_tests_of_cpython_end_as_with_gevent_alone(tmp_path, module):
    pytest.importorskip(f'test.{module}', reason='this Python came without its tests')
    outcomes = {}
    for patch in ('0', '1'):
        results = tmp_path / patch
        command = [sys.executable, *(argument.format(results=results) for argument in command_of(module))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env={**os.environ, 'GREENAIO_PATCH': patch, 'PYTHONPATH': str(ROOT)})
        assert done.returncode in (0, 2), done.stdout + done.stderr
        outcomes[patch] = read_junit(results)
    assert count(outcomes['0'])['tests'] > 3
    assert not differing(outcomes['0'], outcomes['1'])
