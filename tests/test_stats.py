"""What `greenaio.stats` counts, what `greenaio.dump` lists, and who is told of what takes too long."""

import dataclasses
import errno
import io
import linecache
import math
import os
import threading
import time
import tokenize

import gevent
import gevent.util
import pytest
from gevent.events import subscribers
from test_fallback import WITHOUT

import greenaio
from greenaio import File, aligned_buffer, config, events, monkey
from greenaio._core import hub as _hub
from greenaio._core import loop as _loop
from greenaio._core.context import Opcode
from greenaio._core.counters import COUNTERS
from greenaio._core.engine import Engine
from greenaio._core.request import Request
from greenaio._core.tally import Tally, bounds_of
from tests.support.disks import MIB, pattern
from tests.support.kernel import ScriptedContext
from tests.support.processes import ROOT, run_python

READS = 'aio', 'read'


def grown(before, after=None):
    """What was counted since *before*."""
    after = greenaio.stats() if after is None else after
    return {field.name: getattr(after, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(after) if field.name != 'latency'}


@pytest.fixture
def told():
    """The events that somebody who subscribed was told of."""
    found = []

    def subscriber(event):
        if type(event).__module__ == events.__name__:
            found.append(event)

    subscribers.append(subscriber)
    yield found
    subscribers.remove(subscriber)


# The table of counters -----------------------------------------------------------------------------

def test_each_counter_is_a_field_of_stats_and_of_the_documentation():
    fields = [field.name for field in dataclasses.fields(greenaio.stats())]
    assert [counter.name for counter in COUNTERS] == fields[:-1]
    rows = [f'| `{counter.name}` | {counter.help} |' for counter in COUNTERS]
    assert '\n'.join(rows) in (ROOT / 'docs' / 'observing.md').read_text()


def test_each_counter_of_an_engine_is_added_up():
    kinds = {counter.name: counter.kind for counter in COUNTERS}
    counted = [name for name in kinds if hasattr(Tally(), name)]
    assert {kinds[name] for name in counted} == {'counter'}
    assert set(kinds) - set(counted) == {'demoted'} | {name for name in kinds if kinds[name] == 'gauge'}


# Counting ------------------------------------------------------------------------------------------

def test_what_the_kernel_took_is_counted_with_how_long_it_took(data_file):
    with File(data_file, os.O_RDWR | os.O_DIRECT) as file:
        file.pread(4096, 0)                     # it makes the context, and learns what the file system can
        before = greenaio.stats()
        began = time.perf_counter()
        for i in range(10):
            file.pread(4096, i * 4096)
            file.pwrite(aligned_buffer(4096), i * 4096)
        took = time.perf_counter() - began
        after = greenaio.stats()
    count = grown(before, after)
    assert count['submitted'] == count['completed'] == count['batches'] == 20       # one at a time
    assert count['in_flight'] == count['pending'] == count['abandoned'] == 0
    assert count['by_thread'] < 10                  # a file system may say now and then that it would wait
    for direction in 'read', 'write':
        old, new = before.latency['aio', direction], after.latency['aio', direction]
        by_thread = after.latency['thread', direction].count - before.latency['thread', direction].count
        assert new.count - old.count == 10 - by_thread
        assert 0 < new.sum - old.sum < took
        assert 0 < new.p50 <= new.p90 <= new.p99 <= new.p999 <= new.max


def test_page_cache_hits_and_threads_are_told_apart(disk_folder):
    path = os.path.join(disk_folder, 'data')
    with File(path, os.O_RDWR | os.O_CREAT) as file:
        before = greenaio.stats()
        file.pwrite(bytes(4096), 0)
        between = greenaio.stats()
        for _ in range(5):
            file.pread(4096, 0)
        after = greenaio.stats()
    assert grown(before, between)['by_thread'] == 1
    assert between.latency['thread', 'write'].count - before.latency['thread', 'write'].count == 1
    count = grown(between, after)
    assert count['in_line'] == 5 and count['by_thread'] == count['submitted'] == 0


def test_cold_read_by_a_thread_is_a_read(disk_folder):
    path = os.path.join(disk_folder, 'data')
    with open(path, 'wb') as made:
        made.write(pattern(MIB))
        made.flush()
        os.fsync(made.fileno())
        os.posix_fadvise(made.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with File(path) as file:
        before = greenaio.stats()
        file.pread(MIB, 0)                          # more than is copied in line
        after = greenaio.stats()
    assert after.latency['thread', 'read'].count - before.latency['thread', 'read'].count == 1


def seconds(text, what):
    return float(text.partition(what)[2].split()[0])


def test_held_disk_shows_who_waits_and_for_how_long(held_disk):
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)
        before = greenaio.stats()
        held_disk.hold()
        readers = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(3)]
        gevent.sleep(0.1)
        during = grown(before)
        assert during['in_flight'] == during['submitted'] == during['waiting'] == 3
        assert during['completed'] == 0
        text = greenaio.dump()
        readers[0].kill()
        abandoned = greenaio.dump()
        assert grown(before)['abandoned'] == 1 and grown(before)['waiting'] == 2
        held_disk.release()
        gevent.joinall(readers[1:], raise_error=True)
        while greenaio.stats().in_flight:
            gevent.sleep(0.001)
    assert text.count(f'pread of {held_disk.file}, 4096 bytes at ') == 3
    assert 0.1 <= seconds(text, f'pread of {held_disk.file}, 4096 bytes at 8192, in flight for') < 60
    for reader in readers:
        assert repr(reader) in text
    assert 'abandoned' not in text
    assert abandoned.count(' s, abandoned\n') == 1
    latency = greenaio.stats().latency[READS]
    assert 0.1 <= latency.max < 60
    assert latency.count - before.latency[READS].count == 3


def test_dump_shows_where_the_program_waits(driver):
    def waits_here():
        driver.perform_request(Request(Opcode.PREAD, -1, bytearray(8), 16))

    reader = gevent.spawn(waits_here)
    gevent.sleep(0.01)
    assert 'in waits_here' in greenaio.dump()
    assert 'in waits_here' not in greenaio.dump(stacks=False)
    assert 0.01 <= seconds(greenaio.dump(stacks=False), 'pread of ?, 8 bytes at 16, in flight for') < 60
    driver.engine.context.finish_all()
    reader.get()
    assert greenaio.dump() == ''


def test_dump_tells_of_one_moment_though_it_waits_for_its_source(driver, monkeypatch):
    def waits_here():
        driver.perform_request(Request(Opcode.PREAD, -1, bytearray(8)))

    def reads_source(path):
        driver.engine.context.finish_all()
        gevent.joinall(readers)
        return io.StringIO()

    readers = [gevent.spawn(waits_here) for _ in range(2)]
    gevent.sleep(0.01)
    linecache.clearcache()
    monkeypatch.setattr(tokenize, 'open', reads_source)         # as in a patched program
    text = greenaio.dump()
    assert all(reader.dead for reader in readers)
    assert text.count('in waits_here') == text.count('in flight') == 2
    linecache.clearcache()


def test_dump_does_not_name_another_file_that_got_the_number(held_disk):
    file = File(held_disk.file, os.O_RDONLY | os.O_DIRECT)
    file.pread(4096, 0)
    fd = file.fileno()
    held_disk.hold()
    reader = gevent.spawn(file.pread, 4096, 0)
    gevent.sleep(0.02)
    assert held_disk.file in greenaio.dump(stacks=False)
    file.close()
    with open('/dev/null') as other:
        os.dup2(other.fileno(), fd)
    assert 'pread of ?, 4096 bytes at 0, in flight' in greenaio.dump(stacks=False)
    os.close(fd)
    held_disk.release()
    reader.get()


def test_what_a_closed_hub_had_done_stays_counted(data_file):
    before = greenaio.stats()

    def work():
        with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
            for i in range(7):
                file.pread(4096, i * 4096)
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    after = greenaio.stats()
    assert grown(before, after)['completed'] >= 7
    assert after.latency[READS].count - before.latency[READS].count >= 7
    assert after.hubs == before.hubs


def test_forked_child_goes_on_counting_where_its_parent_was(data_file):
    """What other threads had done counts there too, though their hubs stay behind."""
    done, may_end = threading.Event(), threading.Event()

    def work():
        with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
            for i in range(7):
                file.pread(4096, i * 4096)
            done.set()
            may_end.wait()
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    before = greenaio.stats()
    pid = os.fork()
    if pid == 0:
        after = greenaio.stats()
        os._exit(0 if grown(before, after)['submitted'] == 0 and after.hubs < before.hubs else 1)
    may_end.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0


def test_stats_are_frozen_and_complete():
    stats = greenaio.stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.submitted = 0
    with pytest.raises(TypeError):
        stats.latency[READS] = None
    assert set(stats.latency) == {(way, direction) for way in ('aio', 'thread')
                                  for direction in ('read', 'write', 'sync', 'other')}


class Clock(ScriptedContext):
    """A kernel whose time is what the test says."""

    time = 1

    def now(self):
        return self.time


def test_histogram_has_each_time_in_its_bucket():
    context = Clock()
    engine = Engine(context, 8)
    times = [1, 7, 8, 15, 16, 17, 100, 1000, 1023, 1024, 123_456, 2**30, 2**37, 2**38 - 1, 2**50]
    for ns in times:
        context.time = 1
        request = Request(Opcode.PWRITE, 3, bytes(8))
        engine.enqueue(request)
        engine.flush()
        engine.reap()                               # nothing yet, and the clock is looked at again
        context.time = 1 + ns
        context.finish_all()
        engine.reap()
    counts, total, longest = engine.latency(0, 1)
    assert (total, longest) == (sum(times), 2**50)
    for bucket, count in enumerate(counts):
        low, high = bounds_of(bucket)
        assert count == sum(low <= ns < high or ns >= high and bucket == len(counts) - 1 for ns in times)
    assert sum(counts) == len(times)
    assert sum(engine.latency(0, 0)[0]) == 0


def test_buckets_of_the_histogram_leave_no_gap_and_stay_narrow():
    bounds = [bounds_of(bucket) for bucket in range(288)]
    assert bounds[0][0] == 0
    for (low, high), (following, _) in zip(bounds, bounds[1:]):
        assert high == following
        assert high - low <= max(1, low / 8)


def test_percentiles_and_coarse_buckets_say_the_same():
    latency = greenaio._operate.stats._latency(*tally_of([1000] * 90 + [1_000_000] * 10))
    assert latency.count == 100
    assert latency.p50 == pytest.approx(1e-6, rel=0.07)
    assert latency.p90 == pytest.approx(1e-6, rel=0.07)
    assert latency.p99 == pytest.approx(1e-3, rel=0.07)
    assert latency.max == 1e-3
    assert latency.sum == pytest.approx(90e-6 + 10e-3)
    assert latency.buckets[0] == (1024 / 1e9, 90)
    assert latency.buckets[-1] == (2**36 / 1e9, 100)
    assert dict(latency.buckets)[2**19 / 1e9] == 90 and dict(latency.buckets)[2**20 / 1e9] == 100
    nothing = greenaio._operate.stats._latency(*tally_of([]))
    assert nothing.count == 0 and math.isnan(nothing.p50) and math.isnan(nothing.max)


def tally_of(times):
    context = Clock()
    engine = Engine(context, 256)
    for ns in times:
        context.time = 1
        engine.enqueue(Request(Opcode.PREAD, 3, bytearray(8)))
        engine.flush()
        engine.reap()
        context.time = 1 + ns
        context.finish_all()
        engine.reap()
    return engine.latency(0, 0)


def test_what_a_fork_took_away_is_no_latency():
    context = Clock()
    engine = Engine(context, 8)
    engine.enqueue(Request(Opcode.PREAD, 3, bytearray(8)))
    engine.flush()
    engine.reap()
    context.time = 10**9
    engine.cancel(errno.ECANCELED)
    assert sum(engine.latency(0, 0)[0]) == 0


def test_time_held_by_the_share_counts():
    """A device that has its share already: the second waits here, and that is part of what it took."""
    context = Clock()
    engine = Engine(context, 8)
    share = engine.share('disk', 1)
    for _ in range(2):
        engine.enqueue(Request(Opcode.PREAD, 3, bytearray(8)).of(share))
    engine.flush()
    engine.reap()
    context.time = 1001
    context.finish_all()
    engine.reap()
    engine.flush()
    engine.reap()
    context.time = 2001
    context.finish_all()
    engine.reap()
    _, total, longest = engine.latency(0, 0)
    assert (total, longest) == (1000 + 2000, 2000)


def test_without_the_extension_calls_are_counted(data_file):
    run_python(WITHOUT + '''
path = sys.argv[1]
with greenaio.File(path, os.O_RDWR) as file:
    text = ''
    while not text:                     # a thread may be quicker than we look
        reader = gevent.spawn(file.pread, 16, 8)
        gevent.sleep(0)
        text = greenaio.dump()
        reader.get()
        before = greenaio.stats().by_thread - 1
    assert text.startswith(f'pread of {path}, with a thread for 0.'), text
    assert repr(reader) in text
    after = greenaio.stats()
    assert after.by_thread == before + 1 and after.in_flight == after.submitted == 0
    assert after.latency['aio', 'read'].count == 0
assert greenaio.dump() == ''
''', data_file)


# Telling -------------------------------------------------------------------------------------------

def test_request_that_takes_too_long_is_told_of_once(held_disk, told, monkeypatch):
    monkeypatch.setattr(config, 'stuck_after', 1)
    _hub.get_driver().close()                       # a new one looks that often from the first
    with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
        file.pread(4096, 0)
        held_disk.hold()
        readers = [gevent.spawn(file.pread, 4096, i * 4096) for i in range(8)]     # it does one a second
        gevent.sleep(3.3)
        held_disk.release()
        gevent.joinall(readers, raise_error=True)
    assert {(event.operation, event.file, event.nbytes, event.way) for event in told} == {
        ('pread', held_disk.file, 4096, 'in flight')}
    offsets = [event.offset for event in told]
    assert len(set(offsets)) == len(offsets) >= 4
    assert all(1 < event.seconds < 3 for event in told)


def test_who_looks_for_stuck_requests_does_not_keep_the_loop():
    run_python('''
        import gevent, os, tempfile, time
        from greenaio import File
        with tempfile.NamedTemporaryFile(dir='/var/tmp') as made:
            made.write(bytes(4096)); made.flush()
            def read():
                with File(made.name, os.O_RDONLY | os.O_DIRECT) as file:
                    file.pread(4096, 0)
            gevent.spawn(read)
            began = time.perf_counter()
            gevent.get_hub().join()
            assert time.perf_counter() - began < 5
    ''', env={'GREENAIO_STUCK_AFTER': '30'})


def test_slow_submission_is_told_of(driver, told):
    kernel = driver.engine.context

    def slow(batch):
        kernel.frozen_at += 30_000_000
        return len(batch)

    kernel.answers.append(slow)
    before = greenaio.stats().slow_submits
    reader = gevent.spawn(driver.perform_request, Request(Opcode.PREAD, 3, bytearray(8)))
    gevent.sleep(0.01)
    kernel.finish_all()
    reader.get()
    gevent.sleep(0)
    event, = told
    assert isinstance(event, events.SlowSubmit) and event.requests == 1 and event.seconds == 0.03
    assert greenaio.stats().slow_submits == before + 1


def test_file_that_stalls_is_told_of(driver, told, data_file):
    kernel = driver.engine.context
    with File(data_file, os.O_RDONLY | os.O_DIRECT) as file:
        class Stalls:
            def stalled(self, ns):
                return '8:1 ext4', 12, ns / 1e9, 60.0

        def slow(batch):
            time.sleep(0.001)                       # it waits indeed, and not for the processor
            kernel.frozen_at += 30_000_000
            return len(batch)

        kernel.answers.extend([slow, slow])
        for _ in range(2):                          # of the first it is not known yet who it was
            request = Request(Opcode.PREAD, file.fileno(), bytearray(8))
            request.file = Stalls()
            reader = gevent.spawn(driver.perform_request, request)
            gevent.sleep(0.01)
            kernel.finish_all()
            reader.get()
        gevent.sleep(0)
    assert [type(event).__name__ for event in told] == ['SlowSubmit', 'SlowSubmit', 'FileDemoted']


class Refusing(ScriptedContext):
    is_open = False

    def open(self, depth):
        if depth > 40:
            raise OSError(errno.EAGAIN, 'EAGAIN')
        self.is_open = True


def test_refusal_by_the_kernel_is_told_of(told):
    driver = _loop.HubDriver(gevent.get_hub(), Refusing(), depth=256)
    gevent.sleep(0)
    driver.close()
    assert told == [events.Fallback('only 32 were to be had', 32, True)]


def test_run_info_of_gevent_names_the_file(held_disk):
    monkey.patch_all()
    try:
        with File(held_disk.file, os.O_RDONLY | os.O_DIRECT) as file:
            file.pread(4096, 0)
            held_disk.hold()
            reader = gevent.spawn(file.pread, 4096, 0)
            gevent.sleep(0.01)
            info = '\n'.join(gevent.util.format_run_info())
            held_disk.release()
            reader.get()
    finally:
        monkey.unpatch_all()
    where = info.index('* Greenlets that wait for a disk')
    assert f'pread of {held_disk.file}, 4096 bytes at 0, in flight' in info[where:]
    assert repr(reader) in info[where:]
    assert '* Greenlets that wait for a disk' not in gevent.util.format_run_info()
