"""Patched, programs behave as before, and stop nobody. Each in a process of its own."""

import io
import os
import py_compile
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest
from test_file import NEWER_CALLS, SECCOMP

from tests.support.disks import MIB, pattern, temporary_folder
from tests.support.processes import make_plugin_visible, run_program, run_python

PATCHED = '''
import gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey
greenaio.monkey.patch_all()
import io, os, sys, gevent
'''


def test_same_protocol_as_gevents_own():
    run_python('''
        import builtins, io, os, gevent.monkey
        before = {name: getattr(os, name) for name in dir(os)}, builtins.open, io.open
        import greenaio.monkey
        assert ({name: getattr(os, name) for name in dir(os)}, builtins.open, io.open) == before
        assert not greenaio.monkey.is_patched()
        for _ in range(2):
            greenaio.monkey.patch_all()
            greenaio.monkey.patch_all()
            assert greenaio.monkey.is_patched()
            assert gevent.monkey.is_object_patched('os', 'read')
            assert gevent.monkey.is_object_patched('builtins', 'open')
            assert gevent.monkey.get_original('os', 'read') is before[0]['read']
            assert gevent.monkey.get_original('io', 'open') is before[2]
            assert open is io.open is not before[1]
            assert os.read is not before[0]['read'] and os.read.__name__ == 'read'
            greenaio.monkey.unpatch_all()
            assert ({name: getattr(os, name) for name in dir(os)}, builtins.open, io.open) == before
            assert not greenaio.monkey.is_patched()
        greenaio.monkey.unpatch_all()
    ''')


def test_each_part_alone():
    run_python('''
        import builtins, io, os
        import greenaio.monkey
        opener, reader = builtins.open, os.read
        greenaio.monkey.patch_os()
        assert os.read is not reader and builtins.open is opener
        greenaio.monkey.unpatch_all()
        greenaio.monkey.patch_builtins()
        assert os.read is reader and builtins.open is io.open is not opener
    ''')


@pytest.mark.parametrize('call, environment, patched', [
    ('patch_all(greenaio=True)', {}, True), ('patch_all()', {'GREENAIO_PATCH': '1'}, True),
    ('patch_all()', {}, False), ('patch_all()', {'GREENAIO_PATCH': '0'}, False),
    ('patch_all(greenaio=False)', {'GREENAIO_PATCH': '1'}, False),
    ('patch_all(greenaio=True)', {'GREENAIO_PATCH': '0'}, False),
    ('patch_all()', {'GREENAIO_PATCH': ' '}, False), ('patch_all()', {'GREENAIO_PATCH': 'os, open'}, True),
])
def test_plugin_does_it_when_asked(tmp_path, call, environment, patched):
    run_python(f'''
        import gevent.monkey
        gevent.monkey.{call}
        import io, os, sys
        if {patched}:
            import greenaio.fileobject
            with open(sys.executable, 'rb') as file:
                assert type(file) is greenaio.fileobject.BufferedReader
        import greenaio.monkey
        assert greenaio.monkey.is_patched() is {patched}
    ''', env={**make_plugin_visible(tmp_path), **environment})


def test_subscribers_of_gevents_patch_hear_what_they_hear_without_us(tmp_path):
    def events(value):
        return run_python('''
            import gevent.events, gevent.monkey
            def hear(event):
                print(type(event).__name__, getattr(event, 'module_name', ''))
            gevent.events.subscribers.append(hear)
            gevent.monkey.patch_all()
            import greenaio.monkey
            print(greenaio.monkey.is_patched())
        ''', env={**plugin, 'GREENAIO_PATCH': value}).stdout.splitlines()

    plugin = make_plugin_visible(tmp_path)
    plain, patched = events('0'), events('1')
    assert (plain.pop(), patched.pop()) == ('False', 'True')
    assert patched == plain


@pytest.mark.parametrize('part, call', [('os', 'patch_all()'), ('open', 'patch_all()'),
                                        ('open', 'patch_all(greenaio=True)')])
def test_environment_names_the_part_to_be_patched(tmp_path, part, call):
    run_python(f'''
        import builtins, gevent.monkey, os
        before = os.read, builtins.open
        gevent.monkey.{call}
        changed = os.read is not before[0], builtins.open is not before[1]
        assert changed == ({part == 'os'}, {part == 'open'})
    ''', env={**make_plugin_visible(tmp_path), 'GREENAIO_PATCH': part})


@pytest.mark.parametrize('value', ['yes', 'on', 'os,files', 'os,', '2'])
def test_other_values_of_the_variable_are_refused(tmp_path, value):
    done = run_python('import gevent.monkey; gevent.monkey.patch_all()', check=False,
                      env={**make_plugin_visible(tmp_path), 'GREENAIO_PATCH': value})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f'ValueError: GREENAIO_PATCH must be 0, 1, or a list of parts (os, open), not {value!r}')


LIBRARY = '''
import csv, gzip, json, logging, pathlib, pickle, shutil, sqlite3, tempfile, zipfile, tarfile, errno, hashlib
folder = pathlib.Path(sys.argv[1])
def work():
    out = []
    path = folder / 'text'
    path.write_text('one\\ntwo\\n')
    out.append(path.read_bytes())
    with path.open('a') as file:
        out.append((file.tell(), file.write('three'), file.tell()))
    with open(path, 'r+') as file:
        out += [file.readline(), file.tell(), file.read(), file.seek(0, 2), list(file)]
    for wrong in (lambda: open(folder), lambda: open(folder / 'no'), lambda: open(path, 'x'),
                  lambda: open(path, 'q'), lambda: os.open(folder / 'no', 0),
                  lambda: os.stat(folder / 'no'), lambda: os.read(99, 1),
                  lambda: os.pread(0, -1, 0), lambda: os.open(path, 'r'), lambda: os.write(0, 'text')):
        try:
            wrong()
        except Exception as error:
            out.append((type(error), getattr(error, 'errno', None), getattr(error, 'filename', None)))
    fd = os.open(path, os.O_RDWR)
    out += [os.read(fd, 3), os.lseek(fd, 0, 1), os.pread(fd, 4, 1), os.pwrite(fd, b'ONE', 0),
            os.write(fd, b'-'), os.readv(fd, [bytearray(2), bytearray(1)]), os.lseek(fd, 0, 1),
            os.fstat(fd).st_size, os.fsync(fd)]
    os.ftruncate(fd, 5)
    os.close(fd)
    out += [path.read_bytes(), os.lstat(path).st_size, path.stat().st_mode, os.path.exists(folder / 'no')]
    with os.fdopen(os.open(path, os.O_RDONLY)) as file:
        out.append(file.read())
    r, w = os.pipe()
    out += [os.write(w, b'piped'), os.read(r, 10), os.close(r), os.close(w)]
    shutil.copyfile(path, folder / 'copy')
    shutil.copytree(folder, str(folder) + '-tree')
    out.append(sorted(one.name for one in pathlib.Path(str(folder) + '-tree').iterdir()))
    shutil.rmtree(str(folder) + '-tree')
    for kind in (tempfile.NamedTemporaryFile, tempfile.TemporaryFile, tempfile.SpooledTemporaryFile):
        with kind(dir=folder) as file:
            out += [file.write(b'temporary'), file.seek(3), file.read()]
    handler = logging.FileHandler(folder / 'log')
    logger = logging.Logger('x')
    logger.addHandler(handler)
    logger.warning('logged')
    handler.close()
    out.append((folder / 'log').read_text())
    with zipfile.ZipFile(folder / 'zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('inner', 'x' * 100000)
    with zipfile.ZipFile(folder / 'zip') as archive:
        out.append((archive.testzip(), len(archive.read('inner'))))
    with gzip.open(folder / 'gz', 'wt') as file:
        file.write('zipped')
    out.append(gzip.open(folder / 'gz').read())
    with tarfile.open(folder / 'tar', 'w:gz') as archive:
        archive.add(folder / 'zip', 'zip')
    out.append(tarfile.open(folder / 'tar').getnames())
    with open(folder / 'csv', 'w', newline='') as file:
        csv.writer(file).writerows([['a', 'b'], [1, 2]])
    with open(folder / 'csv', newline='') as file:
        out.append(list(csv.reader(file)))
    with open(folder / 'json', 'w+') as file:
        json.dump([1], file)
        file.seek(0)
        out.append(json.load(file))
    with open(folder / 'pickle', 'w+b') as file:
        pickle.dump({1: 2}, file)
        file.seek(0)
        out.append(pickle.load(file))
    with sqlite3.connect(folder / 'db') as base:
        base.execute('create table t (x)')
        base.execute('insert into t values (1)')
        out.append(base.execute('select * from t').fetchall())
    base.close()
    with open(path, 'rb') as file:
        out.append(hashlib.sha256(file.read()).hexdigest())
    return out
result = gevent.spawn(work).get() if 'gevent' in sys.modules else work()
print(repr(result).replace(str(folder), 'FOLDER'))
'''


def test_library_behaves_as_before(tmp_path, folder):
    """The same program, plain and patched, says the same."""
    outputs = []
    for name, prelude in (('plain', 'import io, os, sys\n'), ('patched', PATCHED)):
        os.mkdir(f'{folder}/{name}')
        done = run_python(prelude + LIBRARY, f'{folder}/{name}', check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert len(outputs[0]) > 700
    assert outputs[0] == outputs[1]


DENY = SECCOMP + """
folder, code, numbers = sys.argv[1], getattr(errno, sys.argv[2]), eval(sys.argv[3])
NEEDED = {'eventfd2'} if os.environ.get('GEVENT_LOOP') == 'libuv' else set()    # by the loop itself
def deny_all(names):
    for name in names:
        deny(numbers[name], code)
"""


@pytest.mark.parametrize('code', ['ENOSYS', 'EPERM'])
def test_patched_files_work_in_a_sandbox_that_denies_a_newer_call(disk_folder, code):
    run_python(PATCHED + DENY + textwrap.dedent("""
        from tests.programs.all_ways import use_files
        for name in {*numbers} - NEEDED:        # no hub is made here
            pid = os.fork()
            if pid == 0:
                deny_all([name])
                gevent.spawn(use_files, folder).get()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0, name
    """), disk_folder, code, NEWER_CALLS)


@pytest.mark.parametrize('code', ['ENOSYS', 'EPERM'])
def test_patched_library_behaves_as_before_in_a_sandbox_that_denies_the_newer_calls(code):
    with temporary_folder('memory') as folder:
        os.mkdir(f'{folder}/plain')
        os.mkdir(f'{folder}/patched')
        plain = run_python('import io, os, sys\n' + LIBRARY, f'{folder}/plain').stdout
        done = run_python(DENY + "deny_all({*numbers} - {'preadv', 'pwritev'} - NEEDED)\n" + PATCHED + LIBRARY
                          + 'from tests.programs.all_ways import use_files\n'
                          + 'gevent.spawn(use_files, folder).get()\n', f'{folder}/patched', code, NEWER_CALLS)
    assert done.stdout == plain


def test_child_between_fork_and_exec_runs_nobody_elses_greenlets(folder):
    run_python(PATCHED + '''
log = os.open(sys.argv[1] + '/log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
parent = os.getpid()
def others():
    while True:
        if os.getpid() != parent:
            os.write(log, b'ran in the child')
        gevent.sleep(0)
gevent.spawn(others)
import subprocess
for _ in range(20):
    assert subprocess.run(['true']).returncode == 0
    pid = os.fork()
    if pid == 0:
        fd = os.open(sys.argv[1] + '/child', os.O_RDWR | os.O_CREAT)
        os.write(fd, b'x')
        os.fsync(fd)
        os.close(fd)
        os.execv('/bin/true', ['true'])
    assert os.waitpid(pid, 0)[1] == 0
assert os.fstat(log).st_size == 0
''', folder)


def test_patched_a_frozen_disk_stops_nobody(freezable):
    if os.path.isdir(freezable.path):
        pytest.skip('shown once is enough')
    run_python(PATCHED + '''
import subprocess, time
path, freeze, thaw = sys.argv[1:]
def use():
    with open(path, 'rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read(100000)
        os.pread(file.fileno(), 100, 1 << 20)
use()
subprocess.run(freeze, shell=True, check=True)
subprocess.Popen(f'sleep 0.6; {thaw}', shell=True)
jobs = [gevent.spawn(use) for _ in range(5)]
end, worst = time.monotonic() + 0.5, 0
while (now := time.monotonic()) < end:
    gevent.sleep(0.001)
    worst = max(worst, time.monotonic() - now)
assert not any(job.ready() for job in jobs)
gevent.joinall(jobs, raise_error=True, timeout=10)
assert worst < 0.3, worst
''', freezable.path, *freezable.commands())


def test_run_runs_a_script_patched(tmp_path):
    (tmp_path / 'helper.py').write_text('VALUE = 7')
    script = tmp_path / 'script.py'
    script.write_text('import sys, io, helper, greenaio.monkey\n'
                      'print(__name__, sys.argv[1:], helper.VALUE, greenaio.monkey.is_patched())\n'
                      'sys.exit(3)\n')

    def run(*arguments):
        return subprocess.run([sys.executable, '-m', 'greenaio', 'run', *arguments], capture_output=True,
                              text=True, timeout=60)

    done = run(str(script), '--option', 'x')
    assert (done.returncode, done.stderr) == (3, '')
    assert done.stdout.strip() == "__main__ ['--option', 'x'] 7 True"
    done = run('/no/such/script.py')
    assert (done.returncode, done.stdout) == (2, '')
    assert len(done.stderr.splitlines()) == 1
    done = run('-m', 'this')
    assert done.returncode == 0 and 'Namespaces' in done.stdout


AS_PYTHON_DOES = '''
import atexit, pickle, sys, threading
class Thing:
    field: int
def show(when):
    thing = pickle.loads(pickle.dumps(Thing()))
    print(when, type(thing), sys.argv, sys.path[0], vars(sys.modules[__name__]) is globals())
print(__name__, __file__, __cached__, __package__, __spec__ and __spec__.name, type(__builtins__))
print(Thing.__annotations__)
show('in the script')
atexit.register(show, 'at exit')
threading.Timer(0.1, show, ['in a thread that outlives it']).start()
sys.exit(3)
'''


@pytest.mark.parametrize('arguments', [
    ['script.py', '--', '-m', '--'], ['--', '-script.py'], ['compiled.pyc'], ['link/../script.py'],
    ['package', '--', '-h'], ['archive.zip'], ['-m', 'package', '--', 'x'], ['-m', 'package.module', '-h'],
], ids=' '.join)
def test_run_does_what_python_does(tmp_path, arguments):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'far' / 'folder').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('far/folder')
    for name in ('script.py', '-script.py', 'far/script.py', 'package/__main__.py', 'package/module.py'):
        (tmp_path / name).write_text(AS_PYTHON_DOES)
    py_compile.compile(tmp_path / 'script.py', tmp_path / 'compiled.pyc')
    with zipfile.ZipFile(tmp_path / 'archive.zip', 'w') as archive:
        archive.writestr('__main__.py', AS_PYTHON_DOES)

    def run(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60,
                              cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    expected = run(*arguments)
    assert expected[0] == 3 and 'at exit' in expected[1] and not expected[2]
    assert run('-m', 'greenaio', 'run', *arguments) == expected


@pytest.mark.parametrize('text', ['def fail():\n    1 / 0\nfail()', 'print("not closed"',
                                  'raise KeyboardInterrupt'])
@pytest.mark.parametrize('arguments', [['script.py'], ['-m', 'script'], ['folder']], ids=' '.join)
def test_traceback_of_a_script_is_as_python_shows_it(tmp_path, text, arguments):
    (tmp_path / 'folder').mkdir()
    for name in ('script.py', 'folder/__main__.py'):
        (tmp_path / name).write_text(text)

    def run(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60,
                              cwd=tmp_path)
        return done.returncode, done.stderr

    expected = run(*arguments)
    if os.environ.get('GEVENT_LOOP') == 'libuv' and 'KeyboardInterrupt' in text:
        expected = 1, expected[1]       # with gevent alone as well: SIGINT does not end the process there
    assert expected[0] and 'Error' in expected[1] or 'KeyboardInterrupt' in expected[1]
    assert run('-m', 'greenaio', 'run', *arguments) == expected


def test_script_that_cannot_be_read_is_a_line():
    done = subprocess.run([sys.executable, '-m', 'greenaio', 'run', '/proc/self/mem'], capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'python -m greenaio run: /proc/self/mem: Input/output error\n'


def test_in_the_hub_and_without_one_the_original_is_called(data_file):
    run_python('''
        import greenaio.monkey, threading
        greenaio.monkey.patch_all()
        import gevent, os, sys
        path = sys.argv[1]
        results = []
        def use():
            with open(path, 'rb') as file:
                results.append((file.read(8), os.pread(file.fileno(), 8, 8), os.stat(path).st_size))
        use()
        assert gevent._hub_local.get_hub_if_exists() is None
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        gevent.get_hub().loop.run_callback(use)
        gevent.sleep(0.01)
        gevent.spawn(use).join()
        assert len(results) == 4 and len(set(results)) == 1, results
    ''', data_file)
    with io.open(data_file, 'rb') as file:      # noqa: UP020
        assert file.read() == pattern(MIB)


def test_patched_os_says_what_it_supports():
    """`shutil` asks, and takes what is not there for a function that does nothing."""
    run_python('''
        import os
        sets = (os.supports_dir_fd, os.supports_effective_ids, os.supports_fd, os.supports_follow_symlinks)
        names = ('open', 'stat', 'lstat', 'read')
        before = [set(one) for one in sets]
        wanted = [[getattr(os, name) in one for name in names] for one in sets]
        import greenaio.monkey
        for _ in range(2):
            greenaio.monkey.patch_all()
        assert [[getattr(os, name) in one for name in names] for one in sets] == wanted
        greenaio.monkey.unpatch_all()
        assert [set(one) for one in sets] == before
    ''')


def test_patched_the_state_of_a_symlink_is_copied(folder):
    run_python('''
        import greenaio.monkey, os, sys
        greenaio.monkey.patch_all()
        import shutil
        os.chdir(sys.argv[1])
        os.symlink('nowhere', 'one')
        shutil.copy2('one', 'two', follow_symlinks=False)
        assert os.readlink('two') == 'nowhere'
        assert shutil.rmtree.avoids_symlink_attacks
    ''', folder)


def test_what_is_patched_can_be_pickled():
    run_python('''
        import greenaio.monkey, os, pickle
        greenaio.monkey.patch_all()
        for name in greenaio.monkey._Os.__implements__:
            assert pickle.loads(pickle.dumps(getattr(os, name))) is getattr(os, name), name
        assert pickle.loads(pickle.dumps(open)) is open
    ''')


def test_patched_open_warns_from_the_line_that_called_it(data_file):
    run_python('''
        import greenaio.monkey, sys, warnings
        greenaio.monkey.patch_all()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            open(sys.argv[1], 'rb', 1).close()
            open(sys.argv[1], 'rb')
        assert [(one.category, one.filename) for one in caught] == [
            (RuntimeWarning, '<string>'), (ResourceWarning, '<string>')], caught
    ''', data_file)


def test_patched_functions_kept_as_class_attributes_do_not_bind():
    run_python(PATCHED + textwrap.dedent("""
        import builtins, inspect
        class Storage:
            open, os_open, read, stat, close = builtins.open, os.open, os.read, os.stat, os.close
        class Derived(Storage):
            read_through_the_class = Storage.read
        def use():
            storage = Derived()
            fd = storage.os_open(sys.executable, os.O_RDONLY)
            assert storage.read(fd, 4) + storage.read_through_the_class(fd, 0) == b'\\x7fELF'
            storage.close(fd)
            assert storage.stat('/').st_ino == os.lstat('/').st_ino
            with storage.open(sys.executable, 'rb') as file:
                assert file.read(4) == b'\\x7fELF'
        gevent.spawn(use).get()
        for name in greenaio.monkey._Os.__implements__:
            one, plain = getattr(os, name), gevent.monkey.get_original('os', name)
            assert getattr(type('Kept', (), {name: one})(), name) is one
            assert (one.__name__, one.__qualname__, one.__doc__) == (name, name, plain.__doc__)
            assert inspect.signature(one) == inspect.signature(plain)
    """))


def test_copies_of_open_that_modules_keep_are_replaced(tmp_path):
    """bz2 is there before the patch: gevent's look-up of plugins imports it."""
    run_python("""
        import bz2, io, os, pathlib, sys, tarfile, tokenize
        before = bz2._builtin_open, tarfile.bltn_open, tokenize._builtin_open, open
        assert len(set(before)) == 1
        import greenaio.monkey, gevent
        greenaio.monkey.patch_all()
        gevent.get_hub()
        assert [bz2._builtin_open, tarfile.bltn_open, tokenize._builtin_open] == 3 * [io.open]
        accessor = getattr(pathlib, '_NormalAccessor', None)
        assert accessor is None or [accessor.open, accessor.stat] == [io.open, os.stat]
        def use():
            with bz2.open(sys.argv[1], 'w') as file:
                file.write(b'data')
            with bz2.open(sys.argv[1]) as file:
                assert type(file._fp) is greenaio.fileobject.BufferedReader
                assert file.read() == b'data'
            assert pathlib.Path(sys.argv[1]).stat().st_size == os.path.getsize(sys.argv[1])
        gevent.spawn(use).get()
        greenaio.monkey.unpatch_all()
        assert (bz2._builtin_open, tarfile.bltn_open, tokenize._builtin_open, open) == before
        assert accessor is None or [accessor.open, accessor.stat] == [io.open, os.stat]
    """, tmp_path / 'packed')


UNUSUAL_ARGUMENTS = '''
import os, sys, warnings
TAKE = {'open': [0], 'stat': [], 'lstat': [], 'fsync': [], 'fdatasync': [], 'fstat': [], 'pread': [0, 0]}
def use():
    for name, more in TAKE.items():
        for value in (bytearray(b'/'), memoryview(b'/'), bytearray(b'/nowhere'), 1.5, None, [], True):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter('always')
                try:
                    outcome = type(getattr(os, name)(value, *more))
                except Exception as error:
                    outcome = type(error), getattr(error, 'filename', None)
            print(name, value, outcome, *[(one.message, one.filename) for one in seen], file=sys.stderr)
'''


def test_patched_unusual_arguments_are_taken_as_by_os():
    """With the same warnings, from the same line; in a greenlet and where no hub is."""
    plain, green, alone = (
        re.sub(' at 0x[0-9a-f]+', '', run_python(code, check=False).stderr)
        for code in (UNUSUAL_ARGUMENTS + 'use()', PATCHED + UNUSUAL_ARGUMENTS + 'gevent.spawn(use).get()',
                     PATCHED + UNUSUAL_ARGUMENTS + 'use()'))
    assert plain.count('\n') == 49
    assert green.splitlines() == alone.splitlines() == plain.splitlines()


def test_look_at_all_that_a_program_sees_of_patched_names_finds_no_difference(tmp_path):
    outputs = []
    for name in ('plain', 'patched'):
        (tmp_path / name).mkdir()
        done = run_program('patched_names', name, tmp_path / name, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    assert len(outputs[0]) > 500
    assert [pair for pair in zip(*outputs, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize('loop', ['libev-cext', 'libuv'])
def test_patched_close_wakes_greenlets_that_wait_for_the_fd_in_the_loop(loop):
    """As gevent's own does. An fd that nothing watches is closed at once."""
    run_python(PATCHED + textwrap.dedent("""
        import errno, selectors, socket
        from gevent.socket import wait_read
        pipe, pair = os.pipe(), socket.socketpair()
        for end in (pipe[0], pair[0].detach()):
            waiter = gevent.spawn(wait_read, end, timeout=20)
            gevent.sleep(0.01)
            os.close(end)
            assert end not in os.pipe()         # its number is taken until the waiter is awake
            with gevent.Timeout(5):
                waiter.get()
            for closed in (lambda: os.close(end), lambda: os.fstat(end)):
                try:
                    closed()
                except OSError as error:
                    assert error.errno == errno.EBADF
                else:
                    raise AssertionError
        end, _ = os.pipe()
        selector = selectors.DefaultSelector()
        selector.register(end, selectors.EVENT_READ)
        select = gevent.spawn(selector.select, 20)
        gevent.sleep(0.01)
        os.close(end)
        with gevent.Timeout(5):
            select.get()
        selector.close()
        end, _ = os.pipe()
        os.close(end)
        assert os.dup(1) == end
    """), env={'GEVENT_LOOP': loop})


# Files over files --------------------------------------------------------------------------------

SLOW = PATCHED + '''
import bz2, gzip, lzma, tarfile, zipfile
class Slow(io.RawIOBase):
    """A file below which something waits at each call."""
    def __init__(self, content=b''):
        self.memory = io.BytesIO(content)
    def readable(self): return True
    def writable(self): return True
    def seekable(self): return True
    def readinto(self, buffer):
        gevent.sleep(0)
        return self.memory.readinto(memoryview(buffer)[:100])
    def write(self, data):
        gevent.sleep(0)
        return self.memory.write(data)
    def seek(self, *args):
        return self.memory.seek(*args)
    def tell(self):
        return self.memory.tell()
records = [b'%09d\\n' % i for i in range(3000)]
def share(use, n=4):
    gevent.joinall([gevent.spawn(use, i) for i in range(n)], raise_error=True)
'''


def test_greenlets_share_readers_made_over_a_file():
    """`io`'s kinds, and those of the library that have one inside."""
    run_python(SLOW + '''
packed = {module.__name__: module.compress(b''.join(records)) for module in (gzip, bz2, lzma)}
archive, zipped = io.BytesIO(), io.BytesIO()
with tarfile.open(fileobj=archive, mode='w') as tar:
    member = tarfile.TarInfo('member')
    member.size = 30000
    tar.addfile(member, io.BytesIO(b''.join(records)))
with zipfile.ZipFile(zipped, 'w') as file:
    file.writestr('member', b''.join(records))
plain = Slow(b''.join(records))
makers = {
    'reader': lambda: io.BufferedReader(Slow(b''.join(records)), 64),
    'random': lambda: io.BufferedRandom(Slow(b''.join(records)), 64),
    'pair': lambda: io.BufferedRWPair(Slow(b''.join(records)), Slow(), 64),
    'text': lambda: io.TextIOWrapper(io.BufferedReader(Slow(b''.join(records)), 64)),
    'text of gzip': lambda: gzip.open(io.BufferedReader(Slow(packed['gzip'])), 'rt'),
    'gzip': lambda: gzip.open(Slow(packed['gzip'])),
    'bz2': lambda: bz2.open(Slow(packed['bz2'])),
    'lzma': lambda: lzma.open(Slow(packed['lzma'])),
    'tar': lambda: tarfile.open(fileobj=io.BufferedReader(Slow(archive.getvalue()))).extractfile('member'),
    'lines of text in zip': lambda: io.TextIOWrapper(zipfile.ZipFile(Slow(zipped.getvalue())).open('member')),
}
for kind, make in makers.items():
    for call in ('readline', 'read'):
        got, file = [], make()
        def read(_):
            while record := file.readline() if call == 'readline' else file.read(10):
                got.append(record if isinstance(record, bytes) else record.encode())
        share(read)
        assert sorted(got) == records, (kind, call, len(got))
''')


def test_greenlets_share_writers_made_over_a_file(folder):
    run_python(SLOW + '''
def path(kind):
    return f'{sys.argv[1]}/{kind}'
opens = {
    'writer': lambda name: io.BufferedWriter(open(name, 'wb', 0), 64),
    'random': lambda name: io.BufferedRandom(open(name, 'w+b', 0), 64),
    'text': lambda name: io.TextIOWrapper(io.BufferedWriter(open(name, 'wb', 0), 64)),
    'text on text': lambda name: io.TextIOWrapper(open(name, 'wb')),
    'gzip': lambda name: gzip.open(name, 'wb', 1), 'gzip as text': lambda name: gzip.open(name, 'wt', 1),
    'bz2': lambda name: bz2.open(name, 'wb', 1), 'lzma': lambda name: lzma.open(name, 'wb', preset=0),
}
for kind, opener in opens.items():
    file = opener(path(kind))
    def write(i):
        for record in records[i::4]:
            file.write(record if isinstance(file, io.BufferedIOBase) else record.decode())
            if int(record) % 500 == 0:
                file.flush()
    share(write)
    file.close()
    module = globals().get(kind.split()[0], io)
    with (module.open if hasattr(module, 'compress') else open)(path(kind), 'rb') as file:
        got = file.readlines()
    assert sorted(got) == records, (kind, len(got))
for make in (lambda: io.BufferedWriter(slow, 64), lambda: io.BufferedRWPair(Slow(), slow, 64),
             lambda: io.TextIOWrapper(io.BufferedWriter(slow, 64)), lambda: gzip.open(slow, 'wb')):
    slow = Slow()
    file = make()
    share(write)
    file.flush()
    if isinstance(file, gzip.GzipFile):
        file.close()
        slow.memory = io.BytesIO(gzip.decompress(slow.memory.getvalue()))
    assert sorted(slow.memory.getvalue().splitlines(True)) == records
''', folder)


def test_reader_that_waits_does_not_hold_up_the_writer_of_a_pair():
    run_python(SLOW + '''
(r1, w1), (r2, w2) = os.pipe(), os.pipe()
pair = io.BufferedRWPair(open(r1, 'rb', 0), open(w2, 'wb', 0))
reader = gevent.spawn(pair.read, 4)
gevent.sleep(0.01)
with gevent.Timeout(5):
    pair.write(b'ping')
    pair.flush()
    assert os.read(r2, 4) == b'ping'
    os.write(w1, b'pong')
    assert reader.get() == b'pong'
    pair.close()
os.close(w1)
os.close(r2)
''')


def test_patched_classes_of_io_stand_for_those_of_before(tmp_path):
    run_python('''
        import abc, io, pickle, sys, tarfile
        names = ['BufferedReader', 'BufferedWriter', 'BufferedRandom', 'BufferedRWPair', 'TextIOWrapper']
        plain = {name: getattr(io, name) for name in names}
        old = open(sys.executable, 'rb')
        class Old(io.BufferedReader):
            pass
        class OldWriter(io.BufferedWriter):
            def write(self, data):
                return io.BufferedWriter.write(self, data.upper())
        class OldText(io.TextIOWrapper):
            def __init__(self, file):
                io.TextIOWrapper.__init__(self, file, encoding='ascii')
        import greenaio.monkey, gevent
        for _ in range(2):
            greenaio.monkey.patch_all()
        gevent.get_hub()
        for name in names:
            kind = getattr(io, name)
            assert kind is not plain[name] and issubclass(kind, plain[name]) and issubclass(plain[name], kind)
            assert repr(kind) == repr(plain[name]) and kind.__doc__ == plain[name].__doc__
            assert pickle.loads(pickle.dumps(kind)) is kind
            assert issubclass(kind, io.TextIOBase if name == 'TextIOWrapper' else io.BufferedIOBase)
            assert not issubclass(io.BytesIO, kind) and not isinstance(sys, kind)
        assert isinstance(old, io.BufferedReader) and not isinstance(old, io.BufferedWriter)
        assert isinstance(sys.stdin, io.TextIOWrapper) and issubclass(Old, io.BufferedReader)
        with open(sys.executable, 'rb') as new, open(sys.executable, 'rb', 0) as raw:
            assert isinstance(new, io.BufferedReader) and isinstance(new, plain['BufferedReader'])
            made = io.BufferedReader(raw)
            assert type(made) is io.BufferedReader
            assert repr(made) == f"<_io.BufferedReader name={sys.executable!r}>" == repr(new) == repr(old)
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                try:
                    pickle.dumps(made, protocol)
                except TypeError:
                    pass
                else:
                    raise AssertionError(protocol)
            assert made.read(4) == b'\\x7fELF'
            assert made.detach() is raw
        # What has no file of ours below stays io's, and as fast.
        assert type(io.BufferedReader(io.BytesIO())) is plain['BufferedReader']
        assert type(io.TextIOWrapper(io.BytesIO())) is plain['TextIOWrapper']
        assert type(io.TextIOWrapper(sys.stdin.buffer)) is plain['TextIOWrapper']
        for wrong in (dict(), dict(raw=None), dict(raw=io.BytesIO(), buffer_size=0), dict(nothing=1)):
            outcomes = []
            for kind in (plain['BufferedReader'], io.BufferedReader):
                try:
                    kind(**wrong)
                except Exception as error:
                    outcomes.append(type(error))
            assert len(outcomes) == 2 and outcomes[0] is outcomes[1], (wrong, outcomes)
        # Classes from before the patch, which call the patched class by its name.
        with open(sys.argv[1], 'wb', 0) as raw:
            with OldWriter(raw) as file:
                file.write(b'text')
        with OldText(open(sys.argv[1], 'rb')) as file:
            assert file.read() == 'TEXT'
        # A class that has a class of io and another metaclass.
        class Named(abc.ABC):
            @abc.abstractmethod
            def label(self): ...
        class Mine(io.BufferedReader, Named):
            def label(self):
                return self.raw.name
        with open(sys.argv[1], 'rb', 0) as raw:
            mine = Mine(raw)
            assert mine.label() == sys.argv[1] and mine.read() == b'TEXT'
            assert not isinstance(made, Mine) and not isinstance(old, Mine)
        assert issubclass(tarfile.ExFileObject, greenaio.fileobject.BufferedReader)
        greenaio.monkey.unpatch_all()
        assert {name: getattr(io, name) for name in names} == plain
        assert not issubclass(tarfile.ExFileObject, greenaio.fileobject.BufferedReader)
        old.close()
    ''', tmp_path / 'file')


def test_subclasses_of_patched_classes_behave_as_of_ios():
    """What they override is not wrapped: a lock that it takes comes before the turn, as before io's own."""
    run_python(SLOW + '''
from gevent.lock import RLock
class Locked(io.BufferedReader):
    __slots__ = ()
    lock, depth = RLock(), 0
    def read(self, n):
        with self.lock:
            type(self).depth += 1
            data = super().read(n)
            type(self).depth -= 1
            return data
    def readline(self):
        return self.read(5) + self.read(5)
assert 'greenaio' not in getattr(Locked.read, '__module__', ''), Locked.read
file, got = Locked(Slow(b''.join(records)), 64), []
def read(i):
    while record := file.read(10) if i % 2 else file.peek(1) and file.read(10):
        got.append(record)
with gevent.Timeout(20):
    share(read)
assert sorted(got) == records and Locked.depth == 0
class Forgetful(io.BufferedWriter):
    def __init__(self):
        pass
for call in ('flush', 'close', 'tell', 'detach'):
    try:
        getattr(Forgetful(), call)()
    except ValueError as error:
        assert 'uninitialized' in str(error)
    else:
        raise AssertionError(call)
''')


@pytest.mark.parametrize('end', ['', 'sys.exit(3)', 'raise SystemExit(3)'])
def test_what_is_buffered_over_a_file_is_written_at_the_end_of_the_process(tmp_path, end):
    code = '''
import gzip, io, sys
keep = [io.BufferedWriter(open(sys.argv[1] + '/binary', 'wb', 0)),
        io.TextIOWrapper(open(sys.argv[1] + '/text', 'wb')),
        gzip.open(sys.argv[1] + '/gzip', 'wb')]
for file in keep:
    file.write('data' if isinstance(file, io.TextIOBase) else b'data')
keep.append(keep)
''' + end
    for name, prelude in (('plain', ''), ('patched', PATCHED), ('hub', PATCHED + 'gevent.get_hub()\n')):
        (tmp_path / name).mkdir()
        run_python(prelude + code, tmp_path / name, check=False, env={'PYTHONWARNINGS': 'ignore'})
    contents = [{path.name: path.read_bytes()[10 if path.name == 'gzip' else 0:]     # less the time
                 for path in (tmp_path / name).iterdir()} for name in ('plain', 'patched', 'hub')]
    assert contents[0]['binary'] == contents[0]['text'] == b'data'
    assert contents[0] == contents[1] == contents[2]
