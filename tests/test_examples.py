"""What all examples have in common: Ctrl-C, output that nothing takes, limits that are none."""

import contextlib
import importlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.support import missing
from tests.support.processes import EXAMPLES, run_example, run_in_shell, run_python

TOKEN = {**os.environ, 'OBJECT_SERVER_TOKEN': 'token'}


@pytest.fixture
def inputs(disk_folder):
    """A folder with something for each example."""
    folder = pathlib.Path(disk_folder)
    for name in ('tree', 'objects'):
        (folder / name).mkdir()
    for name, size in (('large', 1 << 40), ('disk.img', 1 << 20)):
        with open(folder / name, 'wb') as file:
            file.truncate(size)
    return folder


def opens(process, text):
    """Whether it has a file open with *text* in its name."""
    names = []
    for fd in os.listdir(f'/proc/{process.pid}/fd'):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f'/proc/{process.pid}/fd/{fd}'))
    return any(text in os.path.basename(name) for name in names)


ENDLESS = {
    'checksum': (('large',), lambda process, folder: opens(process, 'large')),
    'copy_tree': (('tree', 'copy'), lambda process, folder: len(list(folder.glob('copy/*'))) > 99),
    'write_ahead_log': (('--seconds', '60', '.'), lambda process, folder: opens(process, '.wal')),
    'object_server': (('objects', '--port', '0'), lambda process, folder: process.stdout.readline()),
    'nbd_server': (('--tcp', '127.0.0.1:0', 'disk.img'), lambda process, folder: process.stdout.readline())}


ENDS = [(name, signal.SIGINT, 130) for name in ENDLESS] + [
    (name, signal.SIGTERM, 143 if name in ('copy_tree', 'write_ahead_log') else 0)
    for name in ENDLESS if name != 'checksum']


@pytest.mark.parametrize('name, number, status', ENDS)
def test_signal_ends_it_without_a_traceback(inputs, name, number, status):
    arguments, has_begun = ENDLESS[name]
    if name == 'copy_tree':
        for i in range(3000):
            (inputs / 'tree' / str(i)).write_bytes(b'content')
    process = subprocess.Popen([sys.executable, EXAMPLES / f'{name}.py', *arguments], cwd=inputs, env=TOKEN,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 30
        while not has_begun(process, inputs):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == status, errors
    assert errors.count('\n') <= 1
    assert 'Traceback' not in errors
    if name == 'copy_tree':             # no file is there in part
        assert ('incomplete' in errors) == (number == signal.SIGINT)
        copies = [path.read_bytes() for path in inputs.glob('copy/*')]
        assert set(copies) == {b'content'}
        assert 50 < len(copies) < 3000
    else:
        assert sorted(os.listdir(inputs)) == ['disk.img', 'large', 'objects', 'tree']


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, *args):
        if name == 'gevent':
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[1], run_name='__main__')
"""


@pytest.mark.parametrize('name', ENDLESS)
def test_ctrl_c_during_the_imports_gives_no_traceback(name):
    done = run_python(INTERRUPTED, EXAMPLES / f'{name}.py', check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, '', '')


SHORT = {'checksum': ('disk.img',), 'copy_tree': ('objects', 'copy'),
         'write_ahead_log': ('--seconds', '0.01', '.'), 'object_server': ('objects', '--port', '0'),
         'nbd_server': ('--tcp', '127.0.0.1:0', 'disk.img')}


def run_with_stdout(folder, name, redirection):
    """Run an example by a shell that redirects its output."""
    command = [sys.executable, EXAMPLES / f'{name}.py', *SHORT[name]]
    return run_in_shell(command, redirection, cwd=folder, env=TOKEN)


@pytest.mark.parametrize('name', SHORT)
def test_output_that_is_full_is_an_error_of_one_line(inputs, name):
    done = run_with_stdout(inputs, name, '>/dev/full')
    assert done.returncode == 1
    assert done.stderr.startswith(f'{name}.py: ')
    assert 'No space left on device' in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('name, status', [('checksum', 1), ('copy_tree', 0), ('write_ahead_log', 0)])
def test_output_that_is_closed_gives_no_traceback(inputs, name, status):
    done = run_with_stdout(inputs, name, '>&-')
    assert done.returncode == status
    assert done.stderr == ('checksum.py: [Errno 9] Standard output is closed\n' if status else '')


@pytest.mark.parametrize('name', ['checksum', 'copy_tree', 'write_ahead_log'])
def test_reader_that_has_seen_enough_gives_no_line(inputs, name):
    done = run_with_stdout(inputs, name, '> >(exec <&-)')
    assert done.stderr == ''
    assert done.returncode == 1


def test_errors_that_are_closed_cost_no_checksum(inputs):
    done = run_with_stdout(inputs, 'checksum', '2>&-')
    assert done.returncode == 0
    assert done.stdout.endswith('  disk.img\n')


def run_with_small_files(folder, name, *arguments):
    return run_in_shell([sys.executable, EXAMPLES / f'{name}.py', *arguments], '', cwd=folder,
                        before='ulimit -f 100')      # as on a disk that is full, after 100 KiB


def test_copy_that_could_not_be_finished_is_removed(inputs):
    (inputs / 'tree' / 'large').write_bytes(bytes(1 << 20))
    (inputs / 'tree' / 'small').write_bytes(b'content')
    done = run_with_small_files(inputs, 'copy_tree', 'tree', 'copy')
    assert (done.returncode, done.stdout) == (1, '2 files, 1 errors\n')
    assert done.stderr.startswith('copy_tree.py: [Errno 27] File too large') and done.stderr.count('\n') == 1
    assert os.listdir(inputs / 'copy') == ['small']


def test_log_that_has_no_room_is_a_line(inputs):
    done = run_with_small_files(inputs, 'write_ahead_log', '.')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('write_ahead_log.py: [Errno 2') and done.stderr.count('\n') == 1
    assert sorted(os.listdir(inputs)) == ['disk.img', 'large', 'objects', 'tree']


def test_folder_that_cannot_be_made_costs_one_line_for_all_that_is_in_it(inputs):
    for name in ('one', 'two/three'):
        (inputs / 'tree' / name).mkdir(parents=True)
        (inputs / 'tree' / name / 'file').touch()
    done = run_example('copy_tree', 'tree', '/proc/copy', cwd=inputs, text=True)
    assert (done.returncode, done.stdout) == (1, '0 files, 1 errors\n')
    assert done.stderr == "copy_tree.py: [Errno 2] No such file or directory: '/proc/copy'\n"


@pytest.mark.parametrize('name', SHORT)
def test_variable_that_is_out_of_range_is_a_line(inputs, name):
    done = run_in_shell([sys.executable, EXAMPLES / f'{name}.py', *SHORT[name]], '', cwd=inputs,
                        env={**TOKEN, 'GREENAIO_DEPTH': 'abc'})
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith(f'{name}.py: GREENAIO_DEPTH must be') and done.stderr.count('\n') == 1
    assert sorted(os.listdir(inputs)) == ['disk.img', 'large', 'objects', 'tree']


@pytest.mark.parametrize('command, address', [
    (('nbd_server', '--tcp', '127.0.0.1:{}', 'disk.img'), '127.0.0.1:{}'),
    (('object_server', 'objects', '--token', 'x', '--port', '{}'), "('127.0.0.1', {})"),
], ids=lambda one: one[0] if isinstance(one, tuple) else '')
def test_address_that_is_in_use_is_named(inputs, command, address):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        done = run_example(*(word.format(port) for word in command), cwd=inputs, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f'{command[0]}.py: [Errno 98] Address already in use: ')
    assert address.format(port) in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('command, prefix', [
    (('nbd_server', '--tcp', '::1:0', 'disk.img'), 'nbd://[::1]:'),
    (('object_server', 'objects', '--token', 'x', '--host', '[::1]', '--port', '0'), 'http://[::1]:'),
], ids=lambda one: ' '.join(one) if isinstance(one, tuple) else '')
def test_url_of_an_ipv6_address_has_brackets(inputs, command, prefix):
    with contextlib.suppress(OSError), socket.create_server(('::1', 0), family=socket.AF_INET6):
        name, *arguments = command
        process = subprocess.Popen([sys.executable, EXAMPLES / f'{name}.py', *arguments], cwd=inputs,
                                   stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline().startswith(prefix)
        finally:
            process.terminate()
            process.communicate()
        return
    missing('needs IPv6')


STORE = ('object_server', 'objects', '--token', 'x')


@pytest.mark.parametrize('command', [
    (*STORE, '--port', '65536'), (*STORE, '--port', '-1'), (*STORE, '--uploads', '0'),
    (*STORE, '--connections', '0'), (*STORE, '--object-size', '-1'), (*STORE, '--idle-timeout', '0'),
    (*STORE, '--idle-timeout', 'nan'), (*STORE, '--idle-timeout', 'inf'),
    ('nbd_server', 'disk.img', '--unix', ''),
    ('write_ahead_log', '--seconds', 'inf'), ('write_ahead_log', '--seconds', 'nan'),
    ('write_ahead_log', '--greenlets', '1000000'), ('write_ahead_log', 'missing'),
    ('copy_tree', 'missing', 'copy'), ('copy_tree', 'tree', 'missing/copy')], ids=' '.join)
def test_typo_or_limit_that_is_none_is_refused_and_makes_nothing(inputs, monkeypatch, capsys, command):
    name, *arguments = command
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'{name}.py: error: ')
    assert sorted(os.listdir(inputs)) == ['disk.img', 'large', 'objects', 'tree']


@pytest.mark.parametrize('command', [
    ('object_server', 'missing', '--token', 'x'), ('nbd_server', 'missing'),
    ('nbd_server', '--unix', 'missing/socket', 'disk.img')], ids=' '.join)
def test_typo_in_what_a_server_serves_costs_a_line(inputs, command):
    done = run_example(*command, cwd=inputs, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f'{command[0]}.py: [Errno 2] No such file or directory')
    assert done.stderr.count('\n') == 1
    assert sorted(os.listdir(inputs)) == ['disk.img', 'large', 'objects', 'tree']


def test_flask_app_needs_its_folder(tmp_path):
    pytest.importorskip('flask')
    done = subprocess.run([sys.executable, '-c', 'import flask_gunicorn'], cwd=EXAMPLES, capture_output=True,
                          text=True, env={**os.environ, 'FILES': str(tmp_path / 'missing')}, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f'flask_gunicorn.py: FILES={tmp_path}/missing is no folder\n'
