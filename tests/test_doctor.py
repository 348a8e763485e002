"""The doctor tells what really happens here; what is denied to it is really denied."""

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from test_fallback import WITHOUT
from test_file import IO_SETUP, IO_SUBMIT, NEWER_CALLS, SECCOMP

from greenaio._commands import doctor
from greenaio._files import calls as _calls
from tests.support import missing
from tests.support.disks import FreezableDisk, file_system, pattern
from tests.support.processes import run, run_python
from tests.support.scanners import FAN_ACCESS_PERM, FAN_OPEN_PERM, scanned

RUN = '''
import runpy, sys
sys.argv[:1] = ['greenaio', 'doctor']
runpy.run_module('greenaio', run_name='__main__', alter_sys=True)
'''


def examine(*arguments, before='', env=None):
    """The exit status, and the report."""
    done = run_python(before + RUN, '--json', *arguments, env=env, check=False)
    assert done.stderr == '', done.stderr
    return done.returncode, json.loads(done.stdout)


def text(*arguments, before='', env=None):
    done = run_python(before + RUN, *arguments, env=env, check=False)
    assert done.stderr == '', done.stderr
    return done.returncode, done.stdout


def ways(report):
    return {one['name']: one['way'] for one in report['paths'][0]['operations']}


def tried(report):
    return {one['name'] for one in report['paths'][0]['operations'] if one['tried']}


def remedies(report):
    return ' '.join(one['remedy'] for one in report['degraded'])


ALL = ['O_DIRECT read', 'O_DIRECT overwrite', 'O_DIRECT write, the file gets longer', 'buffered read, cached',
       'buffered read, not cached', 'buffered write', 'fsync, fdatasync', 'open, of what is there',
       'open, a new file', 'stat', 'truncate']


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv-cffi'])
def test_disk_takes_native_aio_and_nothing_is_degraded(disk_folder, loop):
    if file_system(disk_folder) not in ('ext2/ext3', 'xfs'):
        missing('needs ext4 or xfs')
    code, report = examine(disk_folder, env={'GEVENT_LOOP': loop})
    assert (code, report['degraded']) == (0, [])
    assert list(ways(report)) == ALL and tried(report) == set(ALL)
    assert ways(report) == {
        'O_DIRECT read': 'native AIO', 'O_DIRECT overwrite': 'native AIO',
        'O_DIRECT write, the file gets longer': 'thread', 'buffered read, cached': 'in line',
        'buffered read, not cached': 'thread', 'buffered write': 'thread', 'fsync, fdatasync': 'native AIO',
        'open, of what is there': 'in line', 'open, a new file': 'thread', 'stat': 'in line',
        'truncate': 'thread'}
    place, machine = report['paths'][0], report['machine']
    st = os.stat(disk_folder)
    assert place['kind'] == 'folder' and place['writable'] and place['fdsync']
    assert place['device'] == f'{os.major(st.st_dev)}:{os.minor(st.st_dev)}'
    assert place['file_system'] in ('ext4', 'xfs') and os.path.ismount(place['mount_point'])
    assert place['alignment'] in (512, 4096) and place['share'] > 0
    assert place['nowait'].keys() == {'O_DIRECT read', 'O_DIRECT overwrite', 'buffered read'}
    assert place['nowait']['buffered read'] == 'yes'
    assert machine['aio']['allowed'] and machine['aio']['depth'] == 256 and machine['aio']['room'] > 0
    assert machine['native'] and machine['kernel'].startswith(f'Linux {os.uname().release}')
    assert loop.split('-')[0] in machine['loop']
    assert os.listdir(disk_folder) == []        # its own file is gone


def test_memory_has_nothing_to_wait_for():
    code, report = examine('/dev/shm')
    assert (code, report['degraded']) == (0, [])
    assert report['paths'][0]['file_system'] == 'tmpfs'
    found = ways(report)
    assert found['O_DIRECT read'] == found['O_DIRECT overwrite'] == 'native AIO'
    assert {found[name] for name in ALL if 'buffered' in name or 'sync' in name or name == 'stat'} == {
        'in line'}
    assert all(why['why'] == doctor.IN_MEMORY for why in report['paths'][0]['operations']
               if why['way'] == 'in line')
    assert not [name for name in os.listdir('/dev/shm') if 'doctor' in name]


def test_file_is_read_and_nothing_else(disk_folder):
    path = os.path.join(disk_folder, 'a [bold]file')
    with open(path, 'wb') as file:
        file.write(pattern(1 << 20))
    os.utime(path, (1, 1))
    before = os.stat(path)
    code, report = examine(path)
    after = os.stat(path)
    assert code == 0 and report['paths'][0]['kind'] == 'file'
    assert (after.st_mtime, after.st_ctime, after.st_size) == (1, before.st_ctime, 1 << 20)
    with open(path, 'rb') as file:
        assert file.read() == pattern(1 << 20)
    assert tried(report) == {'O_DIRECT read', 'buffered read, cached', 'open, of what is there', 'stat'}
    assert set(ways(report)) == set(ALL) - {'open, a new file'}
    assert os.listdir(disk_folder) == [os.path.basename(path)]
    assert path in text(path)[1]                # as it is, whatever rich makes of brackets


def test_part_of_a_file_that_is_not_cached_is_found(disk_folder):
    """A look begins read-ahead, and a disk may be quick enough to have the page there when that look ends:
    all sixteen times of one report, now and then, but not of ten."""
    path = os.path.join(disk_folder, 'cold')
    with open(path, 'wb') as file:
        file.write(pattern(8 << 20))
        os.fsync(file.fileno())
    for _ in range(10):
        with open(path, 'rb') as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        code, report = examine(path)
        assert code == 0
        if 'buffered read, not cached' in tried(report):
            break
    assert 'buffered read, not cached' in tried(report)
    assert ways(report)['buffered read, not cached'] == 'thread'


def test_empty_file_is_fine(folder):
    path = os.path.join(folder, 'empty')
    open(path, 'wb').close()
    assert examine(path)[0] == 0


@pytest.mark.parametrize('path', ['/sys/kernel', '/proc'])
def test_folder_that_takes_no_file_says_so(path):
    code, report = examine(path)
    assert code == 0
    place = report['paths'][0]
    assert place['writable'] is False and 'no file can be made here' in place['notes'][0]
    assert tried(report) == {'open, of what is there', 'stat'}
    assert 'buffered read, cached' in ways(report)


@pytest.mark.parametrize('without', ['', WITHOUT])
def test_read_only_folder_on_a_disk_is_told_of_by_rule(disk_folder, without):
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '--bind', disk_folder, disk_folder)
    try:
        run('mount', '-o', 'remount,bind,ro', disk_folder)
        code, report = examine(disk_folder, before=without)
    finally:
        run('umount', disk_folder)
    assert code == bool(without)
    assert 'Read-only' in report['paths'][0]['notes'][0]
    assert set(ways(report)) == set(ALL) - {'open, a new file'}
    found = {one['name']: one for one in report['paths'][0]['operations']}
    if without:
        assert set(ways(report).values()) == {'thread'}
    else:
        assert found['buffered read, cached']['way'] == 'in line'
        assert found['buffered read, cached']['why'] == doctor.CACHED
        assert found['O_DIRECT read']['way'] == found['O_DIRECT overwrite']['way'] == 'native AIO'


def test_block_device_is_read_and_nothing_else(disk_folder):
    if os.geteuid() != 0 or shutil.which('losetup') is None:
        missing('needs root and losetup')
    image = os.path.join(disk_folder, 'image')
    with open(image, 'wb') as file:
        file.write(pattern(1 << 20))
    loop = run('losetup', '-f', '--show', image).strip()
    try:
        code, report = examine(loop)
    finally:
        run('losetup', '-d', loop)
    assert code == 0 and report['paths'][0]['kind'] == 'block device'
    assert ways(report)['O_DIRECT read'] == 'native AIO'
    assert 'truncate' not in ways(report) and 'O_DIRECT write, the file gets longer' not in ways(report)
    assert not tried(report) & {'O_DIRECT overwrite', 'buffered write', 'fsync, fdatasync'}
    with open(image, 'rb') as file:
        assert file.read() == pattern(1 << 20)


@pytest.mark.parametrize('without', ['', 'import sys; sys.modules["rich"] = None'])
def test_people_get_tables_with_rich_or_without(disk_folder, without):
    code, shown = text(disk_folder, '/dev/shm', before=without)
    assert code == 0
    for expected in ('native AIO', 'aio-max-nr', 'extension', 'built', disk_folder, '/dev/shm', 'tmpfs',
                     'FDSYNC', 'O_DIRECT read', 'RWF_NOWAIT', 'buffered read, not cached',
                     'Nothing is degraded.'):
        assert expected in shown
    assert ('┏' in shown) is (not without)
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize('mask', [FAN_OPEN_PERM, FAN_ACCESS_PERM])
def test_scanner_is_named(disk_folder, tmp_path, mask):
    with scanned(disk_folder, mask) as scanner:
        code, report = examine(disk_folder, tmp_path)
    problem, = [one for one in report['degraded'] if 'fanotify' in one['what']]
    assert problem['what'].startswith(f'{disk_folder}: ')       # and not the other mount
    assert f'(process {scanner.pid})' in problem['what'] and 'exempt' in problem['remedy']
    assert code == 1


def test_each_path_is_reported_also_beside_one_that_is_missing(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'greenaio', 'doctor', '--json', 'missing', str(tmp_path)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == 'python -m greenaio doctor: missing: No such file or directory\n'
    assert [place['path'] for place in json.loads(done.stdout)['paths']] == [str(tmp_path)]


def test_path_that_is_not_there_is_one_line(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for path, why in ((tmp_path / 'missing', 'No such file'), (tmp_path / 'fifo', 'neither'),
                      ('/dev/null', 'neither'), (tmp_path / 'fifo' / 'x', 'Not a directory')):
        done = subprocess.run([sys.executable, '-m', 'greenaio', 'doctor', path], capture_output=True,
                              text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith(f'python -m greenaio doctor: {path}: ') and why in done.stderr
        assert len(done.stderr.splitlines()) == 1


NO_TEXT = os.fsdecode(b'\xfc is \xc3\xbc, not utf-8')


@pytest.mark.parametrize('without', ['', 'import sys; sys.modules["rich"] = None'])
def test_path_that_is_no_text_is_told_nevertheless(tmp_path, without):
    path = tmp_path / NO_TEXT
    path.mkdir()
    shown = text(path, before=without, env={'PYTHONIOENCODING': 'utf-8:strict'})[1]
    assert '\\udcfc' in shown and 'ü' in shown
    for encoding in ('utf-8:strict', 'ascii:strict'):
        report = examine(path, before=without, env={'PYTHONIOENCODING': encoding})[1]
        assert report['paths'][0]['path'] == str(path)


@pytest.mark.parametrize('name', [NO_TEXT, 'a\u3000space that is not escaped', 'a\rline'], ids=ascii)
def test_mount_point_of_any_name_is_found(tmp_path, name):
    if os.geteuid() != 0:
        missing('needs root')
    path = tmp_path / name
    path.mkdir()
    run('mount', '-t', 'tmpfs', 'here', path)
    try:
        place = examine(path)[1]['paths'][0]
    finally:
        run('umount', path)
    assert (place['mount_point'], place['file_system'], place['source']) == (str(path), 'tmpfs', 'here')


# What is degraded --------------------------------------------------------------------------------


def test_extension_that_was_not_built_is_told(disk_folder):
    code, report = examine(disk_folder, before=WITHOUT)
    assert code == 1
    assert not report['machine']['native'] and 'greenaio._core.' in report['machine']['extension']
    problem, = report['degraded']
    assert 'not built' in problem['what'] and 'pip has used the wheel' in problem['what']
    assert '--no-cache-dir' in problem['remedy']
    assert set(ways(report).values()) == {'thread'}
    assert {one['why'] for one in report['paths'][0]['operations']} == {doctor.NOT_BUILT}
    assert os.listdir(disk_folder) == []
    code, shown = text(disk_folder, before=WITHOUT + 'sys.modules["rich"] = None')
    assert code == 1 and '1. Degraded: the extension was not built' in shown and 'To do: install a C' in shown


@pytest.mark.parametrize('call, number, code', [
    ('io_setup', IO_SETUP, 'EPERM'), ('io_setup', IO_SETUP, 'ENOSYS'), ('io_setup', IO_SETUP, 'EAGAIN'),
    ('io_setup', IO_SETUP, 'ENOMEM'), ('io_submit', IO_SUBMIT, 'EPERM')])
def test_seccomp_filter_is_found_out(disk_folder, call, number, code):
    status, report = examine(disk_folder, before=SECCOMP + f'deny({number}, errno.{code})\n')
    assert status == 1
    assert report['machine']['seccomp'] == 2
    aio = report['machine']['aio']
    assert not aio['allowed'] and aio['error'] == f'{call}: {code}' and aio['denied_by'] == 'a seccomp filter'
    problem, = report['degraded']
    assert f'{call}: {code}' in problem['what'] and 'SystemCallFilter=@aio' in problem['remedy']
    found = {one['name']: one for one in report['paths'][0]['operations']}
    assert found['buffered read, cached']['way'] == 'in line'
    if call == 'io_setup':
        for name in ('O_DIRECT read', 'O_DIRECT overwrite', 'fsync, fdatasync'):
            assert found[name]['way'] == 'thread' and call in found[name]['why']


@pytest.mark.parametrize('code', ['EPERM', 'ENOSYS'])
def test_each_denied_call_is_named_with_its_loss_and_the_remedy(code):
    denied = [name for name in NEWER_CALLS if name == 'eventfd2' or name in doctor.NEWER]
    status, report = examine('/dev/shm', before=SECCOMP + ''.join(
        f'deny({NEWER_CALLS[name]}, errno.{code})\n' for name in denied))
    assert status == 1 and len(report['degraded']) == len(denied) == len(doctor.NEWER) + 1
    for name in denied:
        problem, = (one for one in report['degraded'] if name in one['remedy'])
        assert f'({code}) by a seccomp filter' in problem['what'] or f'{name}: {code}' in problem['what']
        assert problem['remedy'].startswith(f'allow {name} in the seccomp profile')
        assert name == 'eventfd2' or doctor.NEWER[name][1] in problem['what']


def test_call_that_the_kernel_does_not_have_yet_is_not_degraded(monkeypatch):
    monkeypatch.setattr(doctor.platform, 'release', lambda: '6.6.1-generic')
    monkeypatch.setattr(_calls, 'errors_of_newer_calls', lambda: {
        'statx': errno.EFAULT, 'cachestat': errno.ENOSYS, 'statmount': errno.ENOSYS})
    found = machine(2)
    doctor._examine_newer_calls(found)
    assert [problem.what.split()[0] for problem in found.problems] == ['cachestat']


def test_depth_that_is_not_to_be_had_is_told(disk_folder):
    """The driver of this very process has some, so all can't be left."""
    code, report = examine(disk_folder, env={'GREENAIO_DEPTH': '65536'})
    aio = report['machine']['aio']
    if aio['aio_max_nr'] != 65536:
        missing('needs fs.aio-max-nr as it is by default')
    assert code == 1
    assert aio['allowed'] and 16 <= aio['depth'] < aio['depth_asked'] == 65536 and aio['room'] == 0
    assert 'sysctl -w fs.aio-max-nr=1048576' in remedies(report)
    assert ways(report)['O_DIRECT read'] == 'native AIO'


def machine(seccomp=0, aio_nr=65536, aio_max_nr=65536):
    aio = doctor.Aio(aio_nr=aio_nr, aio_max_nr=aio_max_nr)
    return doctor.Machine('', '', '', '', '', '', '', seccomp, True, 'built', aio)


@pytest.mark.parametrize('found, call, code, by, to_do', [
    (machine(), 'io_setup', errno.EAGAIN, 'aio-nr is 65536, aio-max-nr 65536', 'sysctl -w fs.aio-max-nr='),
    (machine(2), 'io_setup', errno.EAGAIN, 'aio-max-nr, which is used up', 'sysctl -w fs.aio-max-nr='),
    (machine(2, 0), 'io_setup', errno.EAGAIN, 'a seccomp filter', 'seccomp profile'),
    (machine(0, None, None), 'io_setup', errno.ENOSYS, 'without CONFIG_AIO', 'another kernel'),
    (machine(2, None, None), 'io_setup', errno.ENOSYS, 'without CONFIG_AIO', 'another kernel'),
    (machine(0), 'io_setup', errno.ENOSYS, 'gVisor', 'without'),
    (machine(0), 'io_setup', errno.EPERM, 'a security module', 'audit'),
    (machine(0), 'io_setup', errno.ENOMEM, 'want of memory', 'more'),
    (machine(2), 'openat2', errno.ENOSYS, 'a seccomp filter', 'allow openat2 in the seccomp profile'),
    (machine(0, None, None), 'statx', errno.ENOSYS, 'gVisor', 'without'),
    (machine(0), 'eventfd2', errno.EMFILE, 'limit of open files', 'ulimit -n'),
])
def test_who_denies_it_and_what_to_do(found, call, code, by, to_do):
    denied_by, remedy = doctor._denied_by(found, call, code)
    assert by in denied_by and to_do in remedy


@contextlib.contextmanager
def overlay(folder):
    for name in ('lower', 'upper', 'work', 'mnt'):
        os.mkdir(f'{folder}/{name}')
    run('mount', '-t', 'overlay', 'overlay', '-o',
        f'lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work', f'{folder}/mnt')
    try:
        yield f'{folder}/mnt'
    finally:
        run('umount', f'{folder}/mnt')


def test_overlay_that_cannot_be_asked_is_degraded(disk_folder):
    if os.geteuid() != 0:
        missing('needs root')
    with overlay(disk_folder) as path:
        code, report = examine(path)
        assert os.listdir(path) == []
    assert code == 1
    assert report['paths'][0]['file_system'] == 'overlay'
    problem, = report['degraded']
    assert problem['what'].startswith(f'{path}: overlay does not know RWF_NOWAIT')
    assert 'volume' in problem['remedy']
    found = ways(report)
    assert found['O_DIRECT read'] == found['buffered read, cached'] == found['stat'] == 'thread'


@pytest.fixture
def faulty(tmp_path):
    """A FUSE file system with one file."""
    if os.geteuid() != 0:
        missing('needs root')
    if importlib.util.find_spec('mfusepy') is None:
        missing('needs mfusepy')
    mount, control = tmp_path / 'mnt', tmp_path / 'control'
    mount.mkdir()
    control.touch()
    server = os.path.join(os.path.dirname(__file__), 'faulty.py')
    process = subprocess.Popen([sys.executable, server, mount, control])
    end = time.monotonic() + 10
    while not (mount / 'data').exists() and time.monotonic() < end:
        time.sleep(0.01)
    yield mount
    run('umount', mount)
    process.wait(10)


def test_fuse_takes_threads_and_is_degraded(faulty):
    code, report = examine(faulty / 'data')
    assert code == 1
    assert report['paths'][0]['file_system'].startswith('fuse')
    assert ways(report)['buffered read, cached'] == ways(report)['stat'] == 'thread'
    assert 'RWF_NOWAIT' in report['degraded'][0]['what']


def test_xfs_that_refuses_and_does_not_wait_is_not_degraded(disk_folder):
    if os.geteuid() != 0 or shutil.which('mkfs.xfs') is None:
        missing('needs root and mkfs.xfs')
    image, mount = os.path.join(disk_folder, 'image'), os.path.join(disk_folder, 'mnt')
    os.mkdir(mount)
    with open(image, 'wb') as file:
        file.truncate(400 << 20)
    run('mkfs.xfs', '-q', image)
    run('mount', '-o', 'loop', image, mount)
    try:
        code, report = examine(mount)
    finally:
        run('umount', mount)
    assert (code, report['degraded']) == (0, [])
    assert ways(report)['O_DIRECT overwrite'] == 'native AIO'
    why, = (one['why'] for one in report['paths'][0]['operations'] if one['name'] == 'O_DIRECT overwrite')
    assert why == 'xfs says to RWF_NOWAIT that it would wait, and does not'


def test_disk_that_hangs_is_a_finding(tmp_path):
    if os.geteuid() != 0 or shutil.which('nbdfuse') is None:
        missing('needs root and nbdfuse')
    disk = FreezableDisk(str(tmp_path), size='16M')
    try:
        disk.freeze()
        impatient = 'from greenaio._commands import doctor\ndoctor.PATIENCE = 0.5'
        code, report = examine(disk.path, '/dev/shm', before=impatient)
    finally:
        disk.close()
    assert code == 1
    assert 'gave no answer in 0.5 s' in report['degraded'][0]['what']
    assert report['paths'][1]['operations']     # and nobody else waits
