"""The bench, run as a user would: what it prints, what it writes, what it refuses."""

import ctypes
import importlib.util
import json
import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from greenaio._commands import bench
from tests.support import missing
from tests.support.disks import pattern
from tests.support.processes import run_python


def run(*arguments, env=None, **kwargs):
    return subprocess.run([sys.executable, '-m', 'greenaio', 'bench', *map(str, arguments)],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, **(env or {})}, **kwargs)


def quick(*arguments, **kwargs):
    return run('--size', '4M', '--seconds', '0.2', '--depths', '1,8', *arguments, **kwargs)


def is_page_cached(fd, offset):
    """Ask mincore(2): an attempt to read would begin to read ahead, and could find what it brings."""
    with mmap.mmap(fd, mmap.PAGESIZE, offset=offset, access=mmap.ACCESS_COPY) as page:
        start, answer = ctypes.c_char.from_buffer(page), ctypes.create_string_buffer(1)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(mmap.PAGESIZE), answer) == 0
        del start
        return bool(answer.raw[0] & 1)


@pytest.mark.parametrize('rw', ['randread', 'randwrite'])
@pytest.mark.parametrize('buffered, cache, is_cached', [
    (False, 'warm', False), (True, 'cold', False), (True, 'warm', True)])
def test_page_cache_is_as_asked_for(disk_folder, rw, buffered, cache, is_cached):
    """Who writes over what is cached with O_DIRECT would have to wait, and takes threads: another way than
    is measured."""
    path = os.path.join(disk_folder, 'data')
    with open(path, 'w+b') as file:
        file.write(pattern(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        bench.Load(path, 1 << 20, 4096, rw, 1, buffered, cache).prepare()
        assert is_page_cached(file.fileno(), 512 << 10) == is_cached


def test_own_ways_are_always_there(folder, tmp_path):
    out = tmp_path / 'out.json'
    done = quick(folder, '--json', out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''                # progress on a terminal only
    for text in ('greenaio', 'blocking', 'threadpool', 'IOPS', 'MB/s', 'p99.9', 'gap max'):
        assert text in done.stdout
    report = json.loads(out.read_text())
    assert [(one['way'], one['depth']) for one in report['results']] == [
        (way, depth) for depth in (1, 8) for way in ('greenaio', 'blocking', 'threadpool')]
    for one in report['results']:
        assert one['iops'] > 0 and one['cpu_us'] > 0
        latency = one['latency_us']
        assert 0 < latency['p50'] <= latency['p99'] <= latency['p999']
        assert 0 <= one['hub_gap_ms']['p99'] <= one['hub_gap_ms']['max']
    assert {'machine', 'versions', 'command', 'commands'} <= set(report)
    assert report['machine']['kernel'] and report['versions']['gevent']
    assert os.listdir(folder) == []         # its own file is gone


@pytest.mark.parametrize('rw', ['randwrite', 'read', 'write', 'append'])
def test_every_kind_of_load(folder, rw):
    done = quick(folder, '--rw', rw, '--only', 'greenaio')
    assert done.returncode == 0, done.stderr
    assert rw in done.stdout


def test_without_a_path_it_leaves_nothing_behind(tmp_path):
    done = quick('--only', 'greenaio', env={'TMPDIR': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('cache', ['warm', 'cold'])
def test_buffered(folder, cache):
    done = quick(folder, '--buffered', '--cache', cache, '--only', 'greenaio,blocking')
    assert done.returncode == 0, done.stderr
    assert f'buffered, {cache} cache' in done.stdout


def test_append_leaves_a_file_as_long_as_it_was(folder):
    path = pathlib.Path(folder, 'mine')
    path.write_bytes(pattern(5 << 20) + b'odd')     # longer than --size, and no multiple of a block
    done = quick(path, '--rw', 'append', '--overwrite', '--only', 'greenaio')
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == pattern(5 << 20) + b'odd'


@pytest.mark.parametrize('way', ['fio', 'qemu-img', 'caio'])
def test_other_programs_stand_beside(disk_folder, tmp_path, way):
    if way == 'caio' and importlib.util.find_spec('caio') is None:
        missing('caio is not installed')
    if way != 'caio' and not shutil.which(way):
        missing(f'{way} is not installed')
    out = tmp_path / 'out.json'
    done = quick(disk_folder, '--only', f'greenaio,{way}', '--json', out)
    assert done.returncode == 0, done.stderr
    assert way in done.stdout
    assert all(one['iops'] > 0 for one in json.loads(out.read_text())['results'])


def test_way_that_is_not_installed_is_left_out(folder, tmp_path):
    done = quick(folder, '--against', 'fio', env={'PATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert 'fio is not installed' in done.stderr
    assert 'greenaio' in done.stdout


def test_way_that_fails_is_left_out(disk_folder, tmp_path):
    """io_uring is forbidden in many containers; all else that was measured is worth something."""
    fio = tmp_path / 'fio'
    fio.write_text('#!/bin/sh\necho fio: io_queue_init: Operation not permitted >&2\nexit 1\n')
    fio.chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    done = quick(disk_folder, '--only', 'greenaio,fio:io_uring', env=env)
    assert done.returncode == 0
    why = 'fio failed: fio: io_queue_init: Operation not permitted\n'
    assert done.stderr == f'python -m greenaio bench: fio:io_uring is left out: {why}'
    assert 'greenaio' in done.stdout and 'fio' not in done.stdout
    done = quick(disk_folder, '--only', 'fio:io_uring', env=env)
    assert (done.returncode, done.stdout, done.stderr) == (1, '', f'python -m greenaio bench: {why}')


def test_file_without_o_direct_is_told_before_anything_is_measured():
    path = '/sys/kernel/vmcoreinfo'
    if not os.path.exists(path):
        missing('needs a file of sysfs')
    done = quick(path)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'python -m greenaio bench: {path} takes no O_DIRECT request of 4096 bytes')
    assert '--buffered' in done.stderr and done.stderr.count('\n') == 1


def test_outputs_that_were_made_ahead_do_not_stay_after_a_failure(tmp_path):
    out = tmp_path / 'out.json'
    assert quick('/no/such/file', '--json', out).returncode == 2
    assert os.listdir(tmp_path) == []
    out.write_text('of yesterday')
    assert quick('/no/such/file', '--json', out).returncode == 2
    assert out.read_text() == 'of yesterday'


def test_polling_is_one_more_way(disk_folder):
    done = quick(disk_folder, '--only', 'greenaio', '--poll-us', '50')
    assert done.returncode == 0, done.stderr
    assert 'greenaio+poll' in done.stdout


def test_rounds_are_kept_and_medians_shown(folder, tmp_path):
    out = tmp_path / 'out.json'
    done = quick(folder, '--only', 'greenaio', '--rounds', '3', '--json', out)
    assert done.returncode == 0, done.stderr
    for one in json.loads(out.read_text())['results']:
        assert len(one['rounds']) == 3
        assert one['iops'] == sorted(r['iops'] for r in one['rounds'])[1]


def test_plain_text_without_the_libraries_of_the_extra(folder):
    code = ('import sys; sys.modules["rich"] = sys.modules["hdrh"] = None\n'
            'sys.argv[1:] = ["bench", *sys.argv[1:]]\n'
            'from greenaio.__main__ import main\nsys.exit(main())')
    done = subprocess.run([sys.executable, '-c', code, folder, '--size', '1M', '--seconds', '0.1',
                           '--depths', '4'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 'greenaio' in done.stdout and 'IOPS' in done.stdout and '┃' not in done.stdout


def test_plot_is_a_picture(folder, tmp_path):
    if importlib.util.find_spec('matplotlib') is None:
        missing('matplotlib is not installed')
    done = quick(folder, '--only', 'greenaio', '--plot', tmp_path / 'plot.png')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


PLOTTED = '''
import json, sys, warnings
warnings.simplefilter('error')
from matplotlib.figure import Figure
from greenaio._commands import bench

def look(figure, *args, **kwargs):
    figure.draw_without_rendering()             # which gives each tick its label
    print(json.dumps([[[label.get_text() for label in labels] for labels in (
        axis.get_xticklabels(), axis.get_yticklabels())] + [axis.get_legend() is not None]
        for axis in figure.axes]))

Figure.savefig = look
bench._plot([{'way': way, 'depth': depth, 'iops': 20000 * depth, 'cpu_us': 60 / depth, 'hub_gap_ms': None}
             for depth in (1, 16) for way in ('fio', 'qemu-img')], 'plot.png', 'title')
'''


def test_plot_labels_each_depth_once_and_figures_as_the_table_does():
    if importlib.util.find_spec('matplotlib') is None:
        missing('matplotlib is not installed')
    iops, cpu, gap = json.loads(run_python(PLOTTED).stdout)
    assert iops[0] == cpu[0] == gap[0] == ['1', '16']
    assert '300,000' in iops[1] and '50' in cpu[1]
    assert not any('mathdefault' in label for label in iops[1] + cpu[1])
    assert iops[2] and cpu[2] and not gap[2]    # other programs have no hub


def test_file_that_exists_is_never_written_unless_told_to(folder):
    path = pathlib.Path(folder, 'precious')
    path.write_bytes(pattern(1 << 20))
    for arguments in ([], ['--rw', 'randread', '--overwrite']):
        assert quick(path, '--only', 'greenaio', *arguments).returncode == 0
        assert path.read_bytes() == pattern(1 << 20)
    done = quick(path, '--rw', 'randwrite')
    assert done.returncode == 2
    assert '--overwrite' in done.stderr and len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == pattern(1 << 20)
    assert quick(path, '--rw', 'randwrite', '--overwrite', '--only', 'greenaio').returncode == 0
    assert path.read_bytes() != pattern(1 << 20)
    assert path.stat().st_size == 1 << 20


@pytest.mark.parametrize('arguments', [
    ['--size', 'big'], ['--size', '0'], ['--depths', '0'], ['--depths', 'x'], ['--depths', ''],
    ['--seconds', '-1'], ['--seconds', 'nan'], ['--rw', 'trim'], ['--against', 'dd'],
    ['--block-size', '1000'], ['--size', '1k'], ['--rounds', '0'], ['/no/such/folder/file'],
    ['/dev/null'], ['--cache', 'cold'], ['--cache', 'hot'], ['--rw', 'append', '--against', 'fio'],
    ['--json', '/no/such/folder/x.json'], ['--unknown'], ['--poll-us', '0'], ['/tmp/no-such-file'],
    ['--json', '/tmp'], ['--plot', '/tmp'], ['--plot', 'picture.xyz'], ['--json', '/proc/new'],
    ['--size', '1000000T'], ['--size', f'{10 ** 30}'], ['--size', '8G', '--block-size', '4G'],
    ['--depths', '100000'], ['--depths', '10000', '--block-size', '1G', '--size', '1G'],
    ['--seconds', '1e-9'], ['--seconds', 'inf'], ['--rounds', f'{10 ** 30}'], ['--poll-us', '10000000'],
    ['--only', ','], ['--json', 'a.png', '--plot', 'a.png'], ['/dev/null', '--json', '/dev/null'],
])
def test_bad_arguments_are_one_line_and_status_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    done = quick(tmp_path / 'fifo')
    assert done.returncode == 2
    assert done.stderr == f'python -m greenaio bench: {tmp_path}/fifo is neither a file nor a block device\n'


def test_path_that_is_misspelt_makes_no_file(tmp_path):
    path = tmp_path / 'nosuchdir'
    done = quick(path)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'python -m greenaio bench: {path}: no such file or folder\n'
    assert os.listdir(tmp_path) == []


def test_interrupt_is_one_line_and_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-m', 'greenaio', 'bench', str(tmp_path), '--size', '4M', '--seconds', '20'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(500):
        if os.listdir(tmp_path):
            break
        time.sleep(0.02)
    time.sleep(0.5)                     # it measures
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)
    assert (process.returncode, *output) == (130, '', 'python -m greenaio bench: interrupted\n')
    assert os.listdir(tmp_path) == []


# Ctrl-C as some function of Python's begins, which the profiler is told of.
INTERRUPTED = '''
import os, signal, sys
from greenaio.__main__ import main
function, *sys.argv[1:] = sys.argv[1:]

def look(frame, event, arg):
    if event == 'call' and frame.f_code.co_name == function:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(look)
sys.exit(main())
'''


@pytest.mark.parametrize('function', [
    'cb',                           # a weak reference of the import's calls it: its exceptions go nowhere
    'add_arguments', '_fill', '_measure', 'worker', 'ticker'])
def test_interrupt_anywhere_ends_the_bench(tmp_path, function):
    done = subprocess.run([sys.executable, '-c', INTERRUPTED, function, 'bench', tmp_path, '--size', '1M',
                           '--seconds', '60'], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'python -m greenaio bench: interrupted\n')
    assert os.listdir(tmp_path) == []


def test_no_command_is_one_line_and_status_2():
    done = subprocess.run([sys.executable, '-m', 'greenaio'], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('text, value', [
    ('4096', 4096), ('4k', 4096), ('4K', 4096), ('256M', 256 << 20), ('1G', 1 << 30), ('2MiB', 2 << 20)])
def test_sizes_as_fio_writes_them(text, value):
    assert bench.parse_size(text) == value


def test_offsets_are_aligned_within_the_file_and_for_every_worker():
    for rw in bench.RW:
        for depth in (1, 3, 64):
            load = bench.Load('x', 1 << 20, 4096, rw, 1, False)
            shares = load.offsets(depth)
            assert len(shares) == depth
            for share in shares:
                assert share and len(share) % bench.SAMPLED == 0
                assert all(at % 4096 == 0 for at in share)
                if rw == 'append':
                    assert min(share) >= load.size
                else:
                    assert min(share) >= 0 and max(share) <= load.size - 4096
            if rw == 'append':
                assert len(set().union(*shares)) == sum(map(len, shares))
