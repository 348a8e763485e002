"""``python -m greenaio`` and ``python -m benchmarks`` as a newcomer meets them: output that nothing takes,
files that are closed, signals, and errors that are told in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from greenaio._commands import bench
from greenaio._commands import show as _show
from tests.support.processes import ROOT, run_in_shell, run_python

GREENAIO = (sys.executable, '-m', 'greenaio')
QUICK = ('--size', '1M', '--seconds', '0.05', '--depths', '1', '--only', 'greenaio')
COMMANDS = {'help': ['--help'], 'help of run': ['run', '--help'], 'config': ['config'],
            'doctor': ['doctor', '--json'], 'bench': ['bench', *QUICK]}


def run(folder, *arguments, redirection='', **kwargs):
    """Run ``python -m greenaio`` on *folder*."""
    return run_in_shell([*GREENAIO, *arguments, *([folder] if arguments[0] in ('bench', 'doctor') else [])],
                        redirection, **kwargs)


@pytest.mark.parametrize('name', COMMANDS)
def test_output_that_is_full_is_an_error_of_one_line(disk_folder, name):
    done = run(disk_folder, *COMMANDS[name], redirection='>/dev/full')
    assert done.returncode == 1
    assert done.stderr.endswith(': standard output: No space left on device\n')
    assert done.stderr.count('\n') == 1
    assert os.listdir(disk_folder) == []


def test_errors_that_nothing_takes_cost_no_more_than_the_output(disk_folder):
    assert run(disk_folder, 'config', redirection='>/dev/full 2>&1').returncode == 1


@pytest.mark.parametrize('arguments', [
    (), ('benhc',), ('bench', '/no/such/folder'), ('doctor', '/no/such/folder'),
    ('run', 'missing.py')], ids=' '.join)
@pytest.mark.parametrize('redirection', ['2>/dev/full', '2>&-'])
def test_mistake_has_its_status_though_nothing_takes_its_line(arguments, redirection):
    done = run_in_shell([*GREENAIO, *arguments], redirection)
    assert (done.returncode, done.stdout) == (2, '')


@pytest.mark.parametrize('name', ['config', 'doctor', 'bench'])
def test_output_that_is_closed_is_an_error_before_any_work(disk_folder, name):
    before = os.stat(disk_folder).st_mtime_ns
    done = run(disk_folder, *COMMANDS[name], redirection='>&-')
    assert done.returncode == 1
    assert done.stderr == f'python -m greenaio {name}: standard output: Closed\n'
    assert os.stat(disk_folder).st_mtime_ns == before


@pytest.mark.parametrize('name', ['help', 'config'])
def test_reader_that_has_seen_enough_gives_no_line(disk_folder, name):
    done = run(disk_folder, *COMMANDS[name], redirection='> >(exec <&-)')
    assert (done.returncode, done.stderr) == (1, '')


@pytest.mark.parametrize('name', ['doctor', 'bench'])
def test_closed_input_and_errors_do_not_matter(disk_folder, name):
    done = run(disk_folder, *COMMANDS[name], redirection='<&- 2>&-')
    assert done.returncode == 0
    assert 'greenaio' in done.stdout
    assert os.listdir(disk_folder) == []


def test_problem_is_not_written_to_the_output_where_standard_error_is_closed(tmp_path):
    done = run(tmp_path, 'bench', '--json', '/no/such/folder/x.json', redirection='2>&-')
    assert (done.returncode, done.stdout) == (2, '')


def test_limit_of_file_sizes_is_not_blamed_on_the_output(disk_folder):
    done = run(disk_folder, *COMMANDS['bench'], before='ulimit -f 100')
    assert done.returncode == 1
    assert done.stderr.startswith(f'python -m greenaio bench: {disk_folder}/greenaio-bench-')
    assert done.stderr.endswith(': File too large\n') and done.stderr.count('\n') == 1
    assert os.listdir(disk_folder) == []


def test_disk_that_gets_full_during_the_run_is_one_line(disk_folder):
    done = run(disk_folder, *COMMANDS['bench'], '--rw', 'append', '--size', '64k', before='ulimit -f 100')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith(f'python -m greenaio bench: {disk_folder}/greenaio-bench-')
    assert done.stderr.endswith(': File too large\n') and done.stderr.count('\n') == 1
    assert os.listdir(disk_folder) == []


def test_doctor_of_a_disk_that_is_full_does_not_send_to_dmesg(disk_folder):
    done = run(disk_folder, *COMMANDS['doctor'], before='ulimit -f 0')
    assert (done.returncode, done.stderr) == (1, '')
    problem, = json.loads(done.stdout)['degraded']
    assert problem['what'].endswith(': File too large') and 'ulimit -f' in problem['remedy']
    assert os.listdir(disk_folder) == []


def test_figures_are_kept_where_the_output_is_full(disk_folder, tmp_path):
    out = tmp_path / 'out.json'
    done = run(disk_folder, *COMMANDS['bench'], '--json', out, redirection='>/dev/full')
    assert done.returncode == 1
    assert json.loads(out.read_text())['results'][0]['iops'] > 0


FIGURES = ('qemu-img:threads', '10,000', '120,000', '492', '102.45', '20,123', '41,234', '99,999.99',
           '100.25', '212.50')
SENTENCES = ('O_DIRECT write, the file gets longer', 'native AIO',
             'the kernel would make the file longer inside io_submit, and wait for the disk')


@pytest.mark.parametrize('width', [30, 40, 60, 80, 100, 120])
@pytest.mark.parametrize('has_rich', [True, False], ids=['rich', 'plain'])
@pytest.mark.parametrize('columns, row, right', [
    (bench.COLUMNS, FIGURES, bench.COLUMNS[1:]), (('operation', 'way', 'why'), SENTENCES, ()),
    (('', ''), SENTENCES[1:], ())], ids=['figures', 'sentences', 'facts'])
def test_no_terminal_is_too_narrow_for_a_table(monkeypatch, capsys, width, has_rich, columns, row, right):
    monkeypatch.setenv('COLUMNS', str(width))
    if not has_rich:
        monkeypatch.setitem(sys.modules, 'rich', None)
    _show.table(columns, [row], title='A title', right=right)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    words = [word for text in (*columns[1:], *row) for word in text.split()]
    assert all(word in shown for word in words)


def test_figures_are_shown_where_their_file_is_full(disk_folder):
    done = run(disk_folder, *COMMANDS['bench'], '--json', '/dev/full')
    assert done.returncode == 1 and 'greenaio' in done.stdout
    assert done.stderr == 'python -m greenaio bench: /dev/full: No space left on device\n'
    assert os.listdir(disk_folder) == []


# Signals -----------------------------------------------------------------------------------------

def end(process, number, has_begun):
    """Send *number* to *process* once *has_begun*; return its exit status and what it printed."""
    try:
        deadline = time.monotonic() + 30
        while not has_begun():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        output = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, *output


def start(code, *arguments):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_bench_that_is_terminated_removes_its_file(disk_folder, number, status):
    process = subprocess.Popen([*GREENAIO, 'bench', disk_folder, '--size', '1M', '--seconds', '20'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert end(process, number, lambda: os.listdir(disk_folder)) == (status, '', '')
    assert os.listdir(disk_folder) == []


SLOW = """
import sys, gevent
from greenaio import __main__
from greenaio._commands import doctor
doctor._Examination._reads = lambda *args: gevent.sleep(60)
sys.argv[1:] = ['doctor', sys.argv[1]]
sys.exit(__main__.main())
"""


@pytest.mark.parametrize('number, output', [
    (signal.SIGINT, (130, '', 'python -m greenaio doctor: interrupted\n')), (signal.SIGTERM, (143, '', ''))])
def test_doctor_that_is_ended_takes_its_child_along(disk_folder, number, output):
    process = start(SLOW, disk_folder)
    children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')

    def has_forked():
        return children.read_text() and os.stat(disk_folder).st_mtime_ns > before

    before = os.stat(disk_folder).st_mtime_ns
    time.sleep(0.01)
    assert end(process, number, has_forked) == output       # the child has both pipes
    assert os.listdir(disk_folder) == []


def test_interrupt_amid_a_class_body_is_one():
    """It comes out of an import as another exception, such as RuntimeError."""
    done = run_python("""
import os, signal, sys
from greenaio.__main__ import end_on_signals, without_traceback

class Field:
    def __set_name__(self, owner, name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError('Error calling __set_name__') from error

def work():
    end_on_signals()
    class Owner:
        field = Field()

sys.exit(without_traceback('program', work))
""", check=False)
    assert (done.returncode, done.stderr) == (130, 'program: interrupted\n')


@pytest.fixture
def interrupting(tmp_path):
    """The environment in which the import of gevent sends Ctrl-C."""
    (tmp_path / 'gevent.py').write_text(
        'import os, signal; os.kill(os.getpid(), signal.SIGINT); print("goes on")')
    return {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize('arguments', [
    ('greenaio', '--help'), ('greenaio', 'config'), ('greenaio', 'bench', '.'),
    ('greenaio', 'run', '-m', 'x'), ('benchmarks',)], ids=' '.join)
def test_ctrl_c_during_the_imports_gives_no_traceback(interrupting, arguments):
    done = subprocess.run([sys.executable, '-m', *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, **interrupting})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, '', '')


def test_ctrl_c_that_is_ignored_stays_so_during_the_imports(interrupting):
    """As a shell without job control has it for a command that ends with ``&``."""
    done = run_in_shell([*GREENAIO, '--help'], '', before='trap "" INT', env=interrupting)
    assert done.stdout == 'goes on\n'


def test_script_gets_the_ctrl_c_of_python(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n'
                      'except KeyboardInterrupt:\n    print("caught")')
    done = run_in_shell([*GREENAIO, 'run', script], '')
    assert (done.returncode, done.stdout, done.stderr) == (0, 'caught\n', '')


def test_hangup_that_is_ignored_stays_so():
    """As nohup has it."""
    done = run_python("""
import os, signal
from greenaio.__main__ import end_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
end_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print('goes on')
""")
    assert done.stdout == 'goes on\n'


# python -m benchmarks ----------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, status', [
    (['nosuchgroup'], 2), (['--rounds', '0'], 2), (['--seconds', 'nan'], 2), (['--folder', 'missing'], 2),
    (['reads', '--only', 'nosuchway'], 1), (['--output', '/dev/null/x'], 1)], ids=lambda one: str(one))
def test_benchmarks_refuse_in_one_line(tmp_path, arguments, status):
    pytest.importorskip('rich')
    pytest.importorskip('matplotlib')
    done = subprocess.run([sys.executable, '-m', 'benchmarks', *arguments], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1].startswith('python -m benchmarks: ')
    assert 'Traceback' not in done.stderr
