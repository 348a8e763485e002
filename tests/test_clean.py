"""``python -W error -X dev`` finds nothing to complain of, importing greenaio brings nothing heavy, and what
is compiled has a stub."""

import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest
from conftest import run_python

import greenaio

HOUSE = pathlib.Path(greenaio.__file__).parent
EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / 'examples').glob('*.py'))

# Each costs milliseconds, or is for some program that greenaio is not.
HEAVY = {'argparse', 'asyncio', 'concurrent', 'ctypes', 'dataclasses', 'gevent.lock', 'gevent.pool',
         'gevent.pywsgi', 'gevent.socket', 'gevent.subprocess', 'gevent.threadpool', 'hdrh', 'inspect',
         'json', 'matplotlib', 'multiprocessing', 'pathlib', 'prometheus_client', 'rich', 'shutil',
         'socket', 'ssl', 'subprocess', 'tempfile', 'urllib', 'werkzeug'}


def strictly(*args, **env):
    """What ``python -W error -X dev`` *args* prints."""
    done = subprocess.run([sys.executable, '-W', 'error', '-X', 'dev', *map(str, args)], capture_output=True,
                          text=True, timeout=60, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    return done.stdout


def test_importing_any_module_warns_of_nothing():
    names = [module.name for module in pkgutil.iter_modules([str(HOUSE)], 'greenaio.')]
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


WORK = '''
import os, sys, threading
import gevent, gevent.pool
import greenaio, greenaio.block, greenaio.os

folder = sys.argv[1]
path = os.path.join(folder, 'data')

with greenaio.File(path, os.O_RDWR | os.O_CREAT) as file:
    file.pwrite(bytes(range(256)) * 256, 0)
    file.fsync()
with greenaio.File(path, os.O_RDWR | os.O_DIRECT) as file:
    reads = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(16)]
    gevent.joinall(reads, raise_error=True)
    assert b''.join(read.value for read in reads) == bytes(range(256)) * 256
    gevent.spawn(file.preadv, [greenaio.aligned_buffer(65536)], 0).kill()
    with gevent.Timeout(0, False):
        file.fdatasync()
with greenaio.open(path, 'r+', encoding='latin-1') as file:
    assert file.read(3) == '\\x00\\x01\\x02'
    file.write('…'.encode('utf-8').decode('latin-1'))
with greenaio.open(path, 'rb', direct=True, prefetch=2) as file:
    assert len(file.read()) == 65536
greenaio.copyfile(path, path + '2')
with greenaio.block.BlockDevice(path + '2') as disk:
    disk.pwrite(b'x' * 4096, 0)
    disk.flush()
    assert disk.pread(4096, 0) == b'x' * 4096
fd = greenaio.os.open(path, os.O_RDONLY)
assert len(greenaio.os.read(fd, 100)) == 100
greenaio.os.close(fd)

def in_a_thread():
    with greenaio.File(path) as file:
        file.pread(10, 0)
    gevent.get_hub().destroy()
thread = threading.Thread(target=in_a_thread)
thread.start()
thread.join()
'''


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv-cffi'])
def test_work_leaves_no_warning(folder, loop):
    strictly('-c', WORK, folder, GEVENT_LOOP=loop)


def test_importing_greenaio_brings_nothing_heavy():
    """What gevent itself has imported is there already."""
    done = run_python('''
        import sys, gevent
        before = set(sys.modules)
        import greenaio
        print(*set(sys.modules) - before)
    ''')
    found = set(done.stdout.split())
    assert 'greenaio._file' in found
    assert not {name for name in found if name in HEAVY or name.partition('.')[0] in HEAVY}


def test_the_names_that_come_late_are_those_of_their_modules():
    run_python('''
        import greenaio
        for name in greenaio.__all__:
            assert hasattr(greenaio, name), name
        assert not hasattr(greenaio, 'opne')
        from greenaio import fileobject, open, streams
        assert open is greenaio.open is fileobject.open
        assert greenaio.copyfile is streams.copyfile
    ''')


def test_every_compiled_module_has_a_stub():
    """stubtest passes a module that has none, and compares the others with what was built."""
    assert (HOUSE / 'py.typed').exists()
    assert {path.stem for path in HOUSE.glob('_*.pyx')} == {path.stem for path in HOUSE.glob('*.pyi')}
