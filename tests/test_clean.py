"""``python -W error -X dev`` finds nothing to complain of, importing greenaio brings nothing heavy, and what
is compiled has a stub."""

import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import greenaio
from tests.support.processes import run_program, run_python

HOUSE = pathlib.Path(greenaio.__file__).parent
EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / 'examples').glob('*.py'))

# Each costs milliseconds, or is for some program that greenaio is not.
HEAVY = {'argparse', 'asyncio', 'concurrent', 'ctypes', 'dataclasses', 'gevent.lock', 'gevent.pool',
         'gevent.pywsgi', 'gevent.socket', 'gevent.subprocess', 'gevent.threadpool', 'hdrh', 'inspect',
         'json', 'matplotlib', 'multiprocessing', 'pathlib', 'prometheus_client', 'rich', 'shutil',
         'socket', 'ssl', 'subprocess', 'tempfile', 'urllib', 'werkzeug'}


STRICT = ('-W', 'error', '-X', 'dev')


def strictly(*args, **env):
    """What ``python -W error -X dev`` *args* prints."""
    done = subprocess.run([sys.executable, *STRICT, *map(str, args)], capture_output=True, text=True,
                          timeout=60, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    return done.stdout


def test_importing_any_module_warns_of_nothing():
    names = [module.name for module in pkgutil.walk_packages([str(HOUSE)], 'greenaio.')]
    strictly('-c', 'import ' + ', '.join(name for name in names if name != 'greenaio.__main__'))


def test_every_help_is_printed_and_warns_of_nothing():
    commands = re.findall(r'^    (\w+) ', strictly('-m', 'greenaio', '--help'), re.M)
    assert {'bench', 'run'} <= set(commands)
    for command in commands:
        assert command in strictly('-m', 'greenaio', command, '--help')


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_the_help_of_an_example_warns_of_nothing(path):
    help = strictly(path, '--help')
    assert path.name in help or 'argparse' not in path.read_text()


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv-cffi'])
def test_work_leaves_no_warning(folder, loop):
    run_program('all_kinds_of_work', folder, options=STRICT, env={'GEVENT_LOOP': loop})


def test_importing_greenaio_brings_nothing_heavy():
    """What gevent itself has imported is there already."""
    done = run_python('''
        import sys, gevent
        before = set(sys.modules)
        import greenaio
        print(*set(sys.modules) - before)
    ''')
    found = set(done.stdout.split())
    assert 'greenaio._files.file' in found
    assert not {name for name in found if name in HEAVY or name.partition('.')[0] in HEAVY}


def test_the_names_that_come_late_are_those_of_their_modules():
    run_python('''
        import greenaio
        for name in greenaio.__all__:
            assert hasattr(greenaio, name), name
        assert not hasattr(greenaio, 'opne')
        from greenaio import fileobject, open
        from greenaio._files import copies
        assert open is greenaio.open is fileobject.open
        assert greenaio.copyfile is copies.copyfile
    ''')


def test_every_compiled_module_has_a_stub():
    """stubtest passes a module that has none, and compares the others with what was built."""
    assert (HOUSE / 'py.typed').exists()
    compiled, stubs = ({path.with_suffix('') for path in HOUSE.rglob(name)} for name in ('*.pyx', '*.pyi'))
    assert compiled == stubs
