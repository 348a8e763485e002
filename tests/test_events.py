"""What operators are told of: events, and what a blocked hub is blocked on."""

import dataclasses
import os
import shutil
import tempfile

import pytest

from greenaio import events
from greenaio._operate import blocked as _blocked
from tests.support import missing
from tests.support.disks import FreezableDisk
from tests.support.processes import run_python

EVENTS = [
    events.SlowSubmit(seconds=0.25, requests=3),
    events.FileDemoted(device='8:1 ext4', inode=12, seconds=0.25, until=60.0),
    events.Fallback(reason='io_setup(256): Operation not permitted', depth=0, native=False),
    events.RequestStuck(operation='pread', file='/srv/data', offset=4096, nbytes=512, way='in flight',
                        seconds=30.5),
]


@pytest.fixture
def subscribers():
    import gevent.events
    before = list(gevent.events.subscribers)
    gevent.events.subscribers[:] = []
    yield gevent.events.subscribers
    gevent.events.subscribers[:] = before


@pytest.mark.parametrize('event', EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_says_all_and_stays_as_it_is(event):
    assert not hasattr(event, '__dict__')
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, 1)
        assert f'*{field.name}*' in type(event).__doc__ or f'{field.name}' in type(event).__doc__
    assert dataclasses.replace(event) == event
    assert type(event).__name__ in events.__all__


def test_all_subscribers_are_told(subscribers):
    told, more = [], []
    subscribers += [told.append, more.append]
    for event in EVENTS:
        events.notify(event)
    assert told == more == EVENTS


def test_subscriber_that_fails_is_logged_and_harms_nobody(subscribers, caplog):
    def fail(event):
        raise RuntimeError('not my day')

    subscribers.append(fail)
    events.notify(EVENTS[0])
    record, = caplog.records
    assert record.name == 'greenaio.events' and 'SlowSubmit(seconds=0.25' in record.message
    assert 'not my day' in str(record.exc_info[1])


def test_subscriber_that_fails_prints_nothing_unasked():
    run_python('''
        from greenaio import events
        import gevent.events
        gevent.events.subscribers.append(lambda event: 1 / 0)
        events.notify(events.SlowSubmit(1.0, 1))
    ''')


def test_importing_greenaio_knows_nothing_of_events():
    done = run_python('''
        import sys, gevent, greenaio, greenaio.os
        print(*sys.modules)
    ''')
    late = {'greenaio.events', 'greenaio._operate.blocked', 'gevent.events', 'zope.event'}
    assert not late & set(done.stdout.split())


# Blocked -----------------------------------------------------------------------------------------

def blocked(code, *args, before=''):
    """*code* blocks the hub, and its `report` ends that; `said` is what gevent would not have said itself."""
    with tempfile.NamedTemporaryFile('w', suffix='.py') as script:      # where Python finds its lines
        script.write(f'''
import fcntl, os, signal, socket, subprocess, sys, threading, time
import gevent, gevent.events
from greenaio import events
from greenaio._operate import blocked as _blocked
{before}
said = []

def see(event):
    if gevent.events.IEventLoopBlocked.providedBy(event):
        said.extend(line for line in event.info if 'greenaio' in line and 'plain file' in line)
        report()

events.explain_blocked()
gevent.events.subscribers.append(see)
gevent.get_hub().exception_stream = open(os.devnull, 'w')
gevent.sleep(0.01)              # the hub starts its monitor
{code}
''')
        script.flush()
        return run_python(f'exec(compile(open({script.name!r}).read(), {script.name!r}, "exec"))', *args,
                          timeout=30, env={'GEVENT_MONITOR_THREAD_ENABLE': '1',
                                           'GEVENT_MAX_BLOCKING_TIME': '0.05',
                                           'PYTHONWARNINGS': 'ignore::RuntimeWarning'})   # for want of psutil


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
    """A disk, for ``freeze`` and ``thaw`` in the shell."""
    if os.geteuid() != 0 or shutil.which('nbdfuse') is None:
        missing('needs root and nbdfuse')
    disk = FreezableDisk(str(tmp_path_factory.mktemp('frozen')), size='16M')
    yield disk
    disk.close()


WAYS = '''
freeze, thaw, path = sys.argv[1:]

def report():
    global reports
    reports += 1
    if said or reports > 20:    # the first may be about the shell
        subprocess.run(thaw, shell=True)

fd = os.open(path, os.O_RDWR)
direct = os.open(path, os.O_RDWR | os.O_DIRECT)
import mmap
page = mmap.mmap(-1, 4096)
file = open(path, 'rb', 0)
at = 0

def block(call):
    global at, reports
    at += 1 << 20
    reports = 0
    del said[:]
    subprocess.run(freeze, shell=True)
    call()
    gevent.sleep(0.001)
    return said[:1]             # there may be another before it has noticed

def lines(name, fd, kind):
    return [f'blocked in {name}(2) of {path!r} (fd {fd}), a plain file {kind}: try greenaio']
'''


def test_blocked_in_a_file_says_which(frozen):
    blocked(WAYS + '''
assert block(lambda: os.pread(fd, 4096, at)) == lines('pread', fd, 'read')
os.lseek(fd, 8 << 20, os.SEEK_SET)
assert block(lambda: os.read(fd, 4096)) == lines('read', fd, 'read')
assert block(lambda: os.preadv(fd, [page], at))[0] in (      # whichever of them Python takes
    *lines('preadv', fd, 'read'), *lines('preadv2', fd, 'read'))
assert block(lambda: file.seek(at) and file.read(10)) == lines('read', file.fileno(), 'read')
assert block(lambda: os.pwrite(direct, page, at)) == lines('pwrite', direct, 'write')
assert block(lambda: (os.pwrite(fd, b'x', 0), os.fsync(fd)))[0] in (
    *lines('fsync', fd, 'sync'), *lines('pwrite', fd, 'write'))
''', *frozen.commands(), frozen.path)


def test_blocked_in_another_thread_than_the_first(frozen):
    blocked(WAYS + '''
def thread():
    gevent.get_hub().exception_stream = open(os.devnull, 'w')
    gevent.sleep(0.01)
    found.append(block(lambda: os.pread(fd, 4096, at)))
    gevent.get_hub().destroy()

found = []
worker = threading.Thread(target=thread)
worker.start()
worker.join()           # and this one, which waits for a lock, adds nothing
assert found[0] == lines('pread', fd, 'read'), found
''', *frozen.commands(), frozen.path)


FRAMES = '_blocked._system_call = lambda hub: None       # as where /proc does not say'


def test_where_the_kernel_does_not_say_python_does(frozen):
    blocked(WAYS + '''
class Reader:
    def __init__(self):
        self.file = file

    def read(self):
        self.file.seek(at)
        return self.file.read(10)

def twice():
    os.pread(
        fd, 4096,
        at)

if sys.version_info >= (3, 11):
    assert block(twice) == lines('pread', fd, 'read')
def once():
    data = os.pread(fd, 4096, at)
assert block(once) == lines('pread', fd, 'read')
assert block(Reader().read) == lines('read', file.fileno(), 'read')
''', *frozen.commands(), frozen.path, before=FRAMES)


LEASE = '''
def report():
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK)

path = sys.argv[1]
signal.signal(signal.SIGIO, signal.SIG_IGN)
holder = os.open(path, os.O_RDWR | os.O_CREAT)
fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)       # who opens it waits until that is given back
def opens():
    return os.open(path, os.O_RDONLY)
opens()
assert said == [f'blocked in open(2) of {path!r}, a plain file open: try greenaio'], said
'''


PATCHED = '''
import gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey, posix
greenaio.monkey.patch_all()
os.open = posix.open            # this one call escaped
'''


@pytest.mark.parametrize('before', ['', FRAMES, PATCHED, PATCHED + FRAMES],
                         ids=['kernel', 'frame', 'patched', 'patched-frame'])
def test_blocked_in_open_says_of_what(tmp_path, before):
    blocked(LEASE, tmp_path / 'leased', before=before)


OTHERS = {
    'a pipe': 'r, w = os.pipe(); end = lambda: os.write(w, b"x"); block = lambda: os.read(r, 1)',
    'a socket': '''
a, b = socket.socketpair()
end = lambda: os.write(b.fileno(), b"x")
def block():
    os.read(a.fileno(), 1)
''',
    'a fifo': '''
path = sys.argv[1] + '/fifo'
os.mkfifo(path)
end = lambda: os.open(path, os.O_RDWR)
def block():
    os.open(path, os.O_RDONLY)
''',
    'a sleep': 'end = int; block = lambda: time.sleep(0.2)',
    'a lock': 'lock = threading.Lock(); lock.acquire(); end = lock.release\ndef block():\n    lock.acquire()',
    'a computation': '''
def end():
    global busy
    busy = False
busy = True
def block():
    count = 0
    while busy:
        count += len('read') + hash('open')
''',
    '/dev/zero': '''
zero = open('/dev/zero', 'rb', 0)
def end():
    global busy
    busy = False
busy = True
def block():
    while busy:
        zero.read(1 << 24)
''',
}


@pytest.mark.parametrize('before', ['', FRAMES], ids=['kernel', 'frame'])
@pytest.mark.parametrize('what', OTHERS)
def test_blocked_in_something_else_says_nothing(tmp_path, what, before):
    done = blocked(OTHERS[what] + '''
reports = 0

def report():
    global reports
    reports += 1
    if reports == 2:
        end()

block()
assert not said, said
print(reports)
''', tmp_path, before=before)
    assert int(done.stdout) >= 1


def test_plugin_that_fails_does_not_end_the_monitor():
    done = blocked('''
reports = 0

def report():
    global reports
    reports += 1

time.sleep(0.3)
print(reports)
assert not said
''', before='_blocked._line = lambda hub: 1 / 0')
    assert int(done.stdout) >= 2


def test_file_that_does_not_even_say_what_it_is_counts_as_one(monkeypatch):
    import threading
    hangs, entered = threading.Event(), threading.Event()

    def ask():
        entered.set()
        hangs.wait(10)
        raise FileNotFoundError

    try:
        assert _blocked._is_on_disk('/srv/data', ask)
        assert entered.is_set()
        assert _blocked._is_on_disk('/srv/data', lambda: pytest.fail('a second one asked'))
    finally:
        hangs.set()
    while _blocked._is_asking:
        pass
    assert not _blocked._is_on_disk('/srv/data', ask)


def test_patching_explains_until_it_is_undone():
    run_python('''
        import gevent.events, greenaio.monkey
        from greenaio import events
        before = list(gevent.events.subscribers)
        greenaio.monkey.patch_all()
        greenaio.monkey.patch_all()
        added, = set(gevent.events.subscribers) - set(before)
        assert len(gevent.events.subscribers) == len(before) + 1
        events.explain_blocked()
        assert len(gevent.events.subscribers) == len(before) + 1
        greenaio.monkey.unpatch_all()
        assert gevent.events.subscribers == before
        events.stop_explaining()
        added(object())                 # what is notified else is no concern of its
    ''')
