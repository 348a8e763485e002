"""Everything that greenaio asks of the kernel, and of the allocator, fails once: SWEEP of the matrix.

Each operation runs with its first such call failing, then with its second, and so on until it needs
fewer; each once with that one call failing, and once with all from there on. It may raise, or do as if
nothing had happened; it may not give wrong data, hang, or leave anything behind; the next operation works.
"""

import errno
import os
import shutil
import subprocess

import pytest

from tests.support import missing
from tests.support.disks import MIB, temporary_folder
from tests.support.processes import run_program, side_by_side

HERE = os.path.dirname(__file__)
CALLS, MEMORY = 1, 2


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if shutil.which('gcc') is None:
        missing('needs gcc')
    path = tmp_path_factory.mktemp('sweep') / 'sweep.so'
    subprocess.run(['gcc', '-O1', '-shared', '-fPIC', '-o', path, os.path.join(HERE, 'sweep.c'),
                    '-ldl', '-pthread'], check=True)
    return str(path)


@pytest.fixture(scope='module')
def sweeps(request, library):
    def sweep(kind, which, code, last):
        with temporary_folder(kind) as folder:
            path = os.path.join(folder, 'data')
            with open(path, 'wb') as file:
                file.write(os.urandom(MIB // 2))
                os.fsync(file.fileno())
            return run_program('sweep', path, which, getattr(errno, code), last, timeout=500, check=False,
                              env={'LD_PRELOAD': library, 'PYTHONMALLOC': 'pymalloc'})

    return side_by_side(request, 'test_nth_call_fails', sweep)


@pytest.mark.parametrize('last', [0, 1 << 30], ids=['transient', 'persistent'])
@pytest.mark.parametrize('which,code', [
    (CALLS, 'EIO'), (CALLS, 'EAGAIN'), (CALLS, 'ENOMEM'), (CALLS, 'EPERM'), (MEMORY, 'ENOMEM')])
@pytest.mark.parametrize('kind', ['disk', 'memory'])
def test_nth_call_fails(request, sweeps, kind, which, code, last):
    done = sweeps[request.node.name].result()
    assert done.returncode == 0, done.stderr
    if which == CALLS:                  # Python itself says more than that when its hook has no memory
        assert done.stderr == ''
    counts = dict(line.split(': ') for line in done.stdout.splitlines())
    assert len(counts) == 17
    assert not counts['direct read'].startswith('0 '), 'nothing was made to fail'
