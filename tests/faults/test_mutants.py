"""The mutants fit the code, so that ``python -m tests.mutants`` can be run; it takes a while."""

import os
import shutil
import subprocess
import sys

from conftest import missing

ROOT = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir)


def test_each_mutant_fits():
    if shutil.which('patch') is None:
        missing('needs patch')
    done = subprocess.run([sys.executable, '-m', 'tests.mutants', '--dry-run'], cwd=ROOT, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
