"""The write-ahead log of the examples: nothing acknowledged is lost, whoever is killed and whatever fails."""

import array
import contextlib
import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap

import gevent
import pytest
from gevent.event import Event

import greenaio

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'
BLOCK = 4096
pytestmark = pytest.mark.filterwarnings('error')    # a file that nobody closed is one

sys.path.insert(0, str(EXAMPLES))
try:
    import write_ahead_log as example
finally:
    sys.path.remove(str(EXAMPLES))
Log = example.Log


class Disk:
    """What the log asks of its files, in order; and a switch for each call: to hold it, or to let it fail."""

    def __init__(self):
        self.journal = []           # (call, path, offset, data)
        self.held = {}              # call: Event that lets it go on
        self.began = Event()        # somebody is held
        self.failing = {}           # call: OSError, or a number of bytes

    def count(self, call):
        return [entry[0] for entry in self.journal].count(call)

    def enter(self, call, path, offset=0, data=b''):
        self.journal.append((call, path, offset, bytes(data)))
        if call in self.held:
            self.began.set()
            self.held[call].wait()
        if isinstance(self.failing.get(call), OSError):
            raise self.failing[call]

    def file(self, *args):
        return WatchedFile(self, *args)


class WatchedFile:
    def __init__(self, disk, path, flags=os.O_RDONLY):
        self.disk, self.path = disk, path
        self.file = greenaio.File(path, flags)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.file.close()

    def pread(self, n, offset):
        return self.file.pread(n, offset)[:self.disk.failing.get('pread')]

    def pwrite(self, data, offset):
        self.disk.enter('pwrite', self.path, offset, data)
        written = self.file.pwrite(data, offset)
        self.disk.journal.append(('written', self.path, offset, bytes(data)))
        return self.disk.failing.get('pwrite', written)

    def fsync(self):
        self.disk.enter('fsync', self.path)
        self.file.fsync()
        self.disk.journal.append(('synced', self.path, 0, b''))

    def fdatasync(self):
        self.disk.enter('fdatasync', self.path)
        self.file.fdatasync()
        self.disk.journal.append(('synced', self.path, 0, b''))


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(example, 'File', disk.file)
    return disk


@contextlib.contextmanager
def opened(folder, **kwargs):
    with contextlib.closing(Log(folder, **kwargs)) as log:
        yield log


def append_all(log, records):
    """A greenlet for each record; return {number: record}."""
    greenlets = [gevent.spawn(log.append, record) for record in records]
    gevent.joinall(greenlets, raise_error=True)
    return {greenlet.value: record for greenlet, record in zip(greenlets, records)}


def replayed(folder):
    records = list(Log.replay(folder))
    assert [number for number, _ in records] == list(range(1, len(records) + 1))
    return dict(records)


def spoil(path, what):
    """Change one byte of *what* in the file."""
    data = bytearray(path.read_bytes())
    assert data.count(what) == 1
    data[data.index(what)] ^= 1
    path.write_bytes(data)


def sized(rng, i):
    return b'%d:' % i + bytes(rng.choice([0, 1, 100, 4095, 4096, 9000]))


# What comes back ---------------------------------------------------------------------------------

def test_records_of_hundreds_of_greenlets_come_back_in_order(folder):
    rng = random.Random(1)
    acknowledged = {}

    def work(i):
        for j in range(4):
            record = sized(rng, 10 * i + j)
            acknowledged[log.append(record)] = record

    with opened(folder, segment=1 << 20) as log:
        gevent.joinall([gevent.spawn(work, i) for i in range(300)], raise_error=True)
    assert len(acknowledged) == 1200
    assert replayed(folder) == acknowledged
    assert list(Log.replay(folder)) == sorted(acknowledged.items())


def test_empty_records_are_records(folder):
    with opened(folder) as log:
        assert [log.append(b''), log.append(b''), log.append(b'x')] == [1, 2, 3]
    assert replayed(folder) == {1: b'', 2: b'', 3: b'x'}


def test_record_is_its_bytes_whatever_holds_them(folder):
    numbers = array.array('I', [1, 2])
    with opened(folder) as log:
        append_all(log, [b'1', numbers, bytearray(b'3'), memoryview(b'4.')[::2], b'5'])
        with pytest.raises(TypeError):
            log.append([1, 2])
    assert replayed(folder) == {1: b'1', 2: numbers.tobytes(), 3: b'3', 4: b'4', 5: b'5'}


def test_numbers_go_on_when_it_is_opened_again(folder):
    acknowledged = {}
    for life in range(4):
        with opened(folder, segment=4 * BLOCK) as log:
            acknowledged.update(append_all(log, [b'%d %d' % (life, i) + bytes(700) for i in range(20)]))
        assert replayed(folder) == acknowledged
    with opened(folder):
        pass
    assert replayed(folder) == acknowledged


def test_log_that_is_only_opened_does_not_grow(folder):
    for _ in range(4):
        with opened(folder, segment=BLOCK) as log:
            log._spare.join()
    assert len(os.listdir(folder)) == 1


def test_one_fdatasync_serves_all_who_came_before_it(folder, disk):
    with opened(folder) as log:
        append_all(log, [b'%d' % i for i in range(500)])
    assert 1 <= disk.count('fdatasync') <= 50
    assert disk.count('fdatasync') == len(list(example.groups(folder)))
    assert len(replayed(folder)) == 500


def test_who_comes_during_a_commit_makes_the_next_group(disk_folder, disk):
    disk.held['fdatasync'] = Event()
    with opened(disk_folder) as log:
        first = gevent.spawn(log.append, b'first')
        disk.began.wait()
        others = [gevent.spawn(log.append, b'other') for _ in range(100)]
        gevent.idle()
        assert disk.count('fdatasync') == 1
        assert not first.ready() and not any(other.ready() for other in others)
        disk.held['fdatasync'].set()
        gevent.joinall([first, *others], raise_error=True)
        assert disk.count('fdatasync') == 2


# Segments ----------------------------------------------------------------------------------------

def test_segments_roll_over(folder):
    records = [b'%d ' % i + bytes(3000) for i in range(50)]
    with opened(folder, segment=2 * BLOCK) as log:
        for record in records:
            log.append(record)
        acknowledged = append_all(log, records)     # more than one segment holds, at once
        log._spare.join()
    names = sorted(os.listdir(folder))
    assert len(names) > 50
    assert {os.path.getsize(os.path.join(folder, name)) for name in names} == {2 * BLOCK}
    assert replayed(folder) == {**dict(enumerate(records, 1)), **acknowledged}


def test_largest_record_fits_and_one_byte_more_does_not(folder):
    room = 4 * BLOCK - example.HEADER.size - 2 * example.WORD.size
    with opened(folder, segment=4 * BLOCK) as log:
        assert log.append(bytes(room)) == 1
        with pytest.raises(ValueError, match='do not fit'):
            log.append(bytes(room + 1))
        assert log.append(b'small') == 2
        assert log.append(bytes(room)) == 3
    assert replayed(folder) == {1: bytes(room), 2: b'small', 3: bytes(room)}


def test_segment_is_durable_under_its_name_before_anything_is_written_there(folder, disk):
    with opened(folder, segment=2 * BLOCK) as log:
        for i in range(10):
            log.append(b'%d' % i + bytes(BLOCK))
    for number in range(1, 11):
        path = os.path.join(folder, f'{number:08}.wal')
        calls = [(call, where) for call, where, _, _ in disk.journal if where in (path, folder)]
        made = calls[calls.index(('pwrite', path)):]
        place = made.index(('fdatasync', path))
        assert ('synced', path) in made[:place]
        assert ('synced', folder) in made[made.index(('synced', path)):place]


def test_no_block_is_written_twice(folder, disk):
    with opened(folder, segment=8 * BLOCK) as log:
        for i in range(20):
            append_all(log, [b'%d %d' % (i, j) + bytes(300) for j in range(10)])
    for path in {entry[1] for entry in disk.journal if entry[0] == 'pwrite'}:
        writes = [(offset, offset + len(data)) for call, where, offset, data in disk.journal
                  if call == 'pwrite' and where == path and any(data)]
        assert all(end <= start for (_, end), (start, _) in zip(writes, writes[1:]))
        assert all(start % BLOCK == end % BLOCK == 0 for start, end in writes)


# Crashes -----------------------------------------------------------------------------------------

def test_killed_process_loses_nothing_acknowledged(folder):
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[2])
        import gevent
        from write_ahead_log import Log

        log = Log(sys.argv[1], segment=1 << 18)

        def work(i):
            j = 0
            while True:
                number = log.append(b'%d %d' % (i, j) + bytes(i))
                os.write(1, b'%d %d %d\\n' % (number, i, j))
                j += 1

        gevent.joinall([gevent.spawn(work, i) for i in range(200)], raise_error=True)
    """
    child = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), folder, EXAMPLES],
                             stdout=subprocess.PIPE)
    with child:
        lines = [child.stdout.readline() for _ in range(20_077)]     # amidst a group
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    acknowledged = {}
    for line in lines:
        number, i, j = map(int, line.split())
        acknowledged[number] = b'%d %d' % (i, j) + bytes(i)
    assert len(acknowledged) >= 20_077
    found = replayed(folder)
    assert acknowledged.items() <= found.items()
    with opened(folder) as log:
        assert log.append(b'after') == len(found) + 1
    assert replayed(folder) == {**found, len(found) + 1: b'after'}


def after_power_loss(journal, rng):
    """{path: content} of a disk that lost, of what it had not synced, each sector or not."""
    files, unsynced = {}, {}
    for call, path, offset, data in journal:
        if call == 'pwrite':
            unsynced.setdefault(path, []).append((offset, data))
        elif call == 'synced':
            for offset, data in unsynced.pop(path, []):
                put(files, path, offset, data)
    for path, writes in unsynced.items():
        for offset, data in writes:
            for at in range(0, len(data), 512):
                if rng.random() < 0.5:
                    put(files, path, offset + at, data[at:at + 512])
    return files


def put(files, path, offset, data):
    content = files.setdefault(path, bytearray())
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset:offset + len(data)] = data


def test_power_loss_at_any_point_loses_nothing_acknowledged(folder, disk):
    """And what is appended afterwards is found, with nothing between that was not there before."""
    rng = random.Random(2)
    live = os.path.join(folder, 'live')
    os.mkdir(live)
    appended = {}

    def work(i):
        for j in range(3):
            record = sized(rng, 10 * i + j)
            number = log.append(record)
            appended[number] = record
            disk.journal.append(('acknowledged', number, 0, record))

    with opened(live, segment=32 * BLOCK) as log:
        for i in range(40):
            gevent.spawn(work, i)
            gevent.sleep(rng.choice([0, 0, 0.001]))
    assert len(appended) > 40
    points = len(disk.journal)
    torn = 0
    for life in range(60):
        journal = disk.journal[:rng.randrange(points)]
        dead = os.path.join(folder, str(life))
        os.mkdir(dead)
        for path, content in after_power_loss(journal, rng).items():
            pathlib.Path(dead, os.path.basename(path)).write_bytes(content)
        found = replayed(dead)
        assert {number: record for call, number, _, record in journal
                if call == 'acknowledged'}.items() <= found.items()
        assert found.items() <= appended.items()
        torn += sum(map(any, leftovers(dead)))
        with opened(dead, segment=32 * BLOCK) as log:
            more = append_all(log, [b'after'] * 3)
        assert replayed(dead) == {**found, **more}
    assert torn                     # or the disk was too good to show anything


def leftovers(folder):
    """What there is behind the last good group of each segment."""
    ends = {path: end for path, end, _, _ in example.groups(folder)}
    return [pathlib.Path(path).read_bytes()[ends.get(path, 0):] for path in example.segments(folder)]


@pytest.mark.parametrize('victim', [1, 2, 11, 30])
@pytest.mark.parametrize('blocks', [4, 64])
def test_replay_stops_at_a_spoilt_record_and_appending_goes_on_there(folder, victim, blocks):
    with opened(folder, segment=blocks * BLOCK) as log:
        for i in range(1, 31):
            log.append(b'record %d.' % i)
    path, = [path for path in pathlib.Path(folder).iterdir() if b'record %d.' % victim in path.read_bytes()]
    spoil(path, b'record %d.' % victim)
    good = {i: b'record %d.' % i for i in range(1, victim)}
    assert replayed(folder) == good
    # One record anew, of the same size: those behind it are the very ones that would follow.
    with opened(folder, segment=blocks * BLOCK) as log:
        assert log.append(b'RECORD %d.' % victim) == victim
    assert not any(b'record %d.' % i in path.read_bytes()
                   for path in pathlib.Path(folder).iterdir() for i in range(victim, 31))
    good[victim] = b'RECORD %d.' % victim
    assert replayed(folder) == good
    with opened(folder, segment=blocks * BLOCK) as log:
        good.update(append_all(log, [b'more %d' % i for i in range(30)]))
    assert replayed(folder) == good


def test_records_of_another_life_are_no_sequel(folder):
    """A segment that was in use before holds sound groups, but not with the numbers that follow."""
    with opened(folder, segment=8 * BLOCK) as log:
        for i in range(6):
            log.append(b'old %d' % i)
    segment = pathlib.Path(folder, '00000001.wal')
    data = segment.read_bytes()
    segment.write_bytes(data[:2 * BLOCK] + data[:BLOCK] + data[3 * BLOCK:])
    assert replayed(folder) == {1: b'old 0', 2: b'old 1'}


def test_record_that_contains_a_group_is_still_only_a_record(folder):
    with opened(folder, segment=16 * BLOCK) as log:
        log.append(b'first')
        segment = pathlib.Path(folder, '00000001.wal')
        forged = bytearray(segment.read_bytes()[:BLOCK])
        forged[:8] = (3).to_bytes(8, 'little')
        end = forged.index(b'first') + len(b'first')
        forged[end:end + 4] = example.zlib.crc32(forged[:end]).to_bytes(4, 'little')
        padding = bytes(BLOCK - example.HEADER.size - example.WORD.size)
        log.append(padding + forged * 3)
    assert segment.read_bytes()[2 * BLOCK:3 * BLOCK] == forged
    data = bytearray(segment.read_bytes())
    data[BLOCK:BLOCK + 512] = bytes(512)            # its first sector never came to the disk
    segment.write_bytes(data)
    assert replayed(folder) == {1: b'first'}


def test_what_was_found_is_durable_before_more_is_appended(folder, disk):
    """A group that was written, but whose fdatasync a crash forestalled, must not vanish under its sequel."""
    with opened(folder, segment=4 * BLOCK) as log:
        append_all(log, [b'x' * 5000] * 3)
    last = list(example.groups(folder))[-1][0]
    following = os.path.join(folder, f'{len({path for path, *_ in example.groups(folder)}) + 1:08}.wal')
    disk.journal.clear()
    with opened(folder, segment=4 * BLOCK) as log:
        log.append(b'sequel')
    calls = [(call, path) for call, path, _, _ in disk.journal]
    assert calls.index(('synced', last)) < calls.index(('pwrite', following))


# Kill and failure --------------------------------------------------------------------------------

def test_killed_greenlets_leave_the_others_answered(folder, disk):
    """
    ==============================  ===========================  ========================
    first (its append began it all)  followers                   those of the next group
    ==============================  ===========================  ========================
    append                          append
    in fdatasync                                                 append
    killed                          some killed                  some killed
                                    answered                     answered
    ==============================  ===========================  ========================
    """
    disk.held['fdatasync'] = Event()
    with opened(folder) as log:
        group = [gevent.spawn(log.append, b'%d' % i) for i in range(20)]
        disk.began.wait()
        following = [gevent.spawn(log.append, b'%d' % i) for i in range(20, 40)]
        gevent.idle()
        assert disk.count('fdatasync') == 1
        killed = [group[0], *group[5:10], following[0], *following[5:10]]
        gevent.killall(killed)
        disk.held['fdatasync'].set()
        gevent.joinall(group + following)
        assert log.append(b'after') == 41
    assert all(isinstance(greenlet.value, gevent.GreenletExit) for greenlet in killed)
    for i, greenlet in enumerate(group + following):
        assert greenlet in killed or greenlet.value == i + 1
    assert replayed(folder) == {**{i + 1: b'%d' % i for i in range(40)}, 41: b'after'}


def test_killed_commit_answers_everybody_with_an_error(folder, disk):
    disk.held['fdatasync'] = Event()
    with opened(folder) as log:
        group = [gevent.spawn(failure_of, log, b'1') for _ in range(5)]
        disk.began.wait()
        following = [gevent.spawn(failure_of, log, b'2') for _ in range(5)]
        gevent.idle()
        log._committer.kill()
        gevent.joinall(group + following)
        assert {greenlet.value.errno for greenlet in group + following} == {errno.ECANCELED}
        assert failure_of(log, b'3').errno == errno.ECANCELED
        disk.held.clear()
    with opened(folder) as log:
        log.append(b'4')
    assert list(replayed(folder).values())[-1] == b'4'


def failure_of(log, record):
    try:
        return log.append(record)
    except OSError as error:
        return error


@pytest.mark.parametrize('call, failure', [
    ('fdatasync', OSError(errno.EIO, 'Broken')), ('pwrite', OSError(errno.EIO, 'Broken')), ('pwrite', 512)])
def test_failure_reaches_all_who_wait_and_stops_the_log(folder, disk, call, failure):
    with opened(folder) as log:
        assert log.append(b'good') == 1
        log._spare.join()
        before = disk.count('pwrite'), disk.count('fdatasync')
        disk.held[call] = Event()
        group = [gevent.spawn(failure_of, log, b'1') for _ in range(20)]
        disk.began.wait()
        following = [gevent.spawn(failure_of, log, b'2') for _ in range(20)]
        gevent.idle()
        disk.failing[call] = failure
        disk.held.pop(call).set()
        gevent.joinall(group + following)
        expected = failure.errno if isinstance(failure, OSError) else errno.ENOSPC
        assert [greenlet.value.errno for greenlet in group + following] == [expected] * 40
        disk.failing.clear()
        assert failure_of(log, b'3').errno == expected
        gevent.idle()
        assert (disk.count('pwrite'), disk.count('fdatasync')) == (
            before[0] + 1, before[1] + (call == 'fdatasync'))
    assert replayed(folder)[1] == b'good'
    with opened(folder) as log:
        number = log.append(b'after')
    assert replayed(folder)[number] == b'after'


def test_segment_that_cannot_be_made_stops_the_log(folder, disk, capfd):
    with opened(folder, segment=2 * BLOCK) as log:
        log.append(b'1' * BLOCK)
        log._spare.join()
        disk.failing['fsync'] = OSError(errno.ENOSPC, 'No space left on device')
        log.append(b'2' * BLOCK)    # takes the spare; no other one can be made
        with pytest.raises(OSError, match='No space'):
            log.append(b'3')
        with pytest.raises(OSError, match='No space'):
            log.append(b'4')
        disk.failing.clear()
    assert 'No space left on device' in capfd.readouterr().err
    assert replayed(folder) == {1: b'1' * BLOCK, 2: b'2' * BLOCK}


def test_what_could_not_be_read_is_not_cut_off(folder, disk):
    with opened(folder, segment=4 * BLOCK) as log:
        append_all(log, [b'%d' % i + bytes(3000) for i in range(20)])
    found = replayed(folder)
    disk.failing['pread'] = 2 * BLOCK
    with pytest.raises(OSError, match='Short read'):
        Log(folder)
    disk.failing.clear()
    assert replayed(folder) == found


def test_close_waits_for_what_was_appended_and_refuses_the_rest(folder):
    log = Log(folder)
    greenlets = [gevent.spawn(log.append, b'%d' % i) for i in range(100)]
    gevent.sleep(0)
    log.close()
    gevent.joinall(greenlets, raise_error=True)
    with pytest.raises(ValueError, match='closed'):
        log.append(b'late')
    log.close()
    assert len(replayed(folder)) == 100


def test_log_that_is_closed_makes_no_more_segments(folder, capfd):
    Log(folder).close()
    made = os.listdir(folder)
    for _ in range(50):
        gevent.sleep(0.001)
    assert os.listdir(folder) == made
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('call', ['pwrite', 'fsync'])
def test_log_that_is_closed_has_nothing_in_flight(folder, disk, call):
    """Or that would keep the folder's lock, or make a segment under the next log."""
    log = Log(folder)
    disk.held[call] = Event()
    disk.began.wait()
    closing = gevent.spawn(log.close)
    gevent.idle()
    assert not closing.ready()
    disk.held.pop(call).set()
    closing.get()
    Log(folder).close()


def test_folder_has_one_log_at_a_time(folder):
    with opened(folder) as log:
        with pytest.raises(BlockingIOError):
            Log(folder)
        log.append(b'unharmed')
    with opened(folder) as log:
        assert log.append(b'2') == 2


# The command line --------------------------------------------------------------------------------

def command(*args):
    return subprocess.run([sys.executable, EXAMPLES / 'write_ahead_log.py', *args], capture_output=True,
                          text=True, timeout=60)


def test_demonstration_measures_both_and_tidies_up(disk_folder):
    done = command(disk_folder, '--greenlets', '8', '--seconds', '0.2', '--compare')
    assert (done.returncode, done.stderr) == (0, '')
    assert [line.rsplit(maxsplit=2)[0].split(',')[0] for line in done.stdout.splitlines()] == [
        'group commit', 'thread pool']
    assert os.listdir(disk_folder) == []
    assert command(disk_folder, '--seconds', '0.1').stdout.count('\n') == 1


def test_folder_that_takes_no_file_is_told_of_in_a_line():
    done = command('/proc')
    assert done.returncode == 1
    assert done.stderr.startswith('write_ahead_log.py: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('arguments', [
    ['--greenlets', '0'], ['--greenlets', 'many'], ['--seconds', '0'], ['--seconds', 'nan'], ['--what'],
    ['/no/such/folder'], ['/dev/null']])
def test_bad_arguments_exit_with_2(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ''
    assert 'usage:' in done.stderr
