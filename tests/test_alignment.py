"""O_DIRECT at any offset, length and address: the same bytes and the same size as without."""

import errno
import os
import random
import threading

import gevent
import pytest

import greenaio
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio._core import handle as _handle
from greenaio._core import hub as _hub
from greenaio._files import ranges as _ranges
from tests.support.disks import MIB, pattern
from tests.support.processes import run_program


@pytest.fixture
def file(folder):
    path = os.path.join(folder, 'file')
    with open(path, 'wb') as file:
        file.write(pattern(65536))
        os.fsync(file.fileno())
    with File(path, os.O_RDWR | os.O_DIRECT) as file:
        yield file
    assert not _ranges.held()


def contents(file):
    with open(file.name, 'rb') as plain:
        return plain.read()


@pytest.mark.parametrize('n, offset', [
    (1, 0), (100, 0), (4096, 1), (511, 1), (513, 511), (10000, 777), (65536, 3), (100, 65500), (10, 65536),
    (10, 70000), (0, 5), (512, 512)])
def test_reads_what_is_there(file, n, offset):
    want = pattern(65536)[offset:offset + n]
    assert file.pread(n, offset) == greenaio.os.pread(file.fileno(), n, offset) == want
    into = bytearray(n)
    assert file.preadv([into], offset) == len(want)
    assert into[:len(want)] == want and not any(into[len(want):])
    parts = [bytearray(n // 3), aligned_buffer(n // 3 + 1), bytearray(n)]
    got = file.preadv(parts, offset)
    want = pattern(65536)[offset:offset + sum(map(len, parts))]
    assert b''.join(map(bytes, parts))[:got] == want


@pytest.mark.parametrize('n, offset', [
    (1, 0), (100, 10), (4096, 1), (511, 1), (513, 511), (10000, 777), (100, 65500), (10, 65536), (10, 70000),
    (1, 65535), (3000, 65530), (0, 5), (512, 65300), (1000, 131072 + 5)])
def test_writes_land_where_they_should_and_the_end_is_exact(file, n, offset):
    data = os.urandom(n)
    want = bytearray(pattern(65536))
    if n:
        want.extend(bytes(max(0, offset + n - len(want))))
    want[offset:offset + n] = data
    assert file.pwrite(data, offset) == n
    assert contents(file) == want
    assert file.pwritev([data[:n // 2], b'', data[n // 2:]], offset) == n
    assert contents(file) == want


def test_random_reads_and_writes_against_a_model(file):
    rng = random.Random(20261123)
    model = bytearray(pattern(65536))
    for _ in range(400):
        n, offset = rng.choice([1, 7, 512, 600, 4096, 9000]), rng.randrange(0, 80000)
        if rng.random() < 0.3:
            n, offset = n // 512 * 512, offset // 512 * 512
        if rng.random() < 0.5:
            assert file.pread(n, offset) == model[offset:offset + n]
        else:
            data = rng.randbytes(n)
            assert file.pwrite(data, offset) == n
            if n:
                model.extend(bytes(max(0, offset + n - len(model))))
                model[offset:offset + n] = data
    assert contents(file) == model


def test_neighbours_in_one_sector_never_lose_each_others_bytes(file):
    """
        one                    two                     the sector
        reads it: aa aa
                               must wait
        writes: 11 aa                                  11 aa
                               reads it: 11 aa
                               writes: 11 22           11 22
    """
    size, count = 37, 200

    def writer(i):
        for turn in range(3):
            file.pwrite(bytes([i, turn]) * 18 + b'.', i * size)

    gevent.joinall([gevent.spawn(writer, i) for i in range(count)], raise_error=True)
    want = b''.join(bytes([i, 2]) * 18 + b'.' for i in range(count)) + pattern(65536)[count * size:]
    assert contents(file) == want


def test_aligned_write_beside_misaligned_ones_is_whole(file):
    block = aligned_buffer(4096)
    block[:] = b'B' * 4096
    jobs = [gevent.spawn(file.pwrite, block, 8192) for _ in range(10)]
    jobs += [gevent.spawn(file.pwrite, bytes([i]) * 10, 8192 + 4096 + 10 * i) for i in range(50)]
    jobs += [gevent.spawn(file.pwrite, bytes([i]) * 10, 8192 - 10 * i - 10) for i in range(50)]
    jobs += [gevent.spawn(file.pwrite, block, 8192) for _ in range(10)]
    gevent.joinall(jobs, raise_error=True)
    got = contents(file)
    assert got[8192:12288] == b'B' * 4096
    assert got[12288:12288 + 500] == b''.join(bytes([i]) * 10 for i in range(50))
    assert got[8192 - 500:8192] == b''.join(bytes([i]) * 10 for i in reversed(range(50)))


def test_appenders_that_make_it_longer_get_each_its_place(file):
    jobs = [gevent.spawn(file.pwrite, bytes([i]) * 100, 65536 + i * 100) for i in range(50)]
    gevent.joinall(jobs, raise_error=True)
    assert contents(file) == pattern(65536) + b''.join(bytes([i]) * 100 for i in range(50))


def copy_into(fd, how):
    """Copy 100 bytes to the beginning of *fd*: the same as are there in `other_writes`."""
    source = os.open(os.path.join(os.path.dirname(os.readlink(f'/proc/self/fd/{fd}')), 'source'),
                     os.O_RDWR | os.O_CREAT)
    os.pwrite(source, b'B' * 100, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    if how == 'copied':
        assert greenaio.os.copy_file_range(source, fd, 100, 0, 0) == 100
    else:
        assert greenaio.os.sendfile(fd, source, 0, 100) == 100
    os.close(source)


def other_writes():
    """What is done at the same time, and what the file has to be afterwards; -1: only as long."""
    odd, rest = b'D' * 5000, pattern(65536)[5100:]
    buffered = b'B' * 100
    yield 'beside it', 65536, lambda fd: greenaio.os.pwrite(fd, buffered, 0), buffered + odd + rest
    yield 'behind it', 65536, lambda fd: greenaio.os.pwritev(fd, [buffered], 5100), (
        pattern(65536)[:100] + odd + buffered + rest[100:])
    yield 'far behind', 0, lambda fd: greenaio.os.pwrite(fd, buffered, 100000), (
        (bytes(100) + odd).ljust(100000, b'\0') + buffered)
    yield 'longer', 0, lambda fd: greenaio.os.ftruncate(fd, 100000), (bytes(100) + odd).ljust(100000, b'\0')
    yield 'allocated', 0, lambda fd: greenaio.os.posix_fallocate(fd, 0, 99999), (
        (bytes(100) + odd).ljust(99999, b'\0'))
    yield 'emptied', 65536, lambda fd: greenaio.os.ftruncate(fd, 0), b''
    yield 'opened', 65536, lambda fd: os.close(
        greenaio.os.open(os.readlink(f'/proc/self/fd/{fd}'), os.O_WRONLY | os.O_TRUNC)), b''
    for how in ('copied', 'sent'):
        yield how, 65536, lambda fd, how=how: copy_into(fd, how), buffered + odd + rest


@pytest.mark.parametrize('is_first', [False, True], ids=['second', 'first'])
@pytest.mark.parametrize('size, change, want', [
    pytest.param(*case, id=name.replace(' ', '-')) for name, *case in other_writes()])
def test_misaligned_write_undoes_nothing_that_goes_through_the_cache(file, size, change, want, is_first):
    """Nor does it cut off what others have made longer since it looked at the size."""
    fd = os.open(file.name, os.O_RDWR)
    wanted = (want, want or bytes(100) + b'D' * 5000)
    for i in range(10):
        os.truncate(file.name, 0)
        os.pwrite(fd, pattern(65536)[:size], 0)
        os.fsync(fd)
        pair = [lambda: file.pwrite(b'D' * 5000, 100), lambda: change(fd)]
        first, second = pair[::-1] if is_first else pair
        jobs = [gevent.spawn(first)]
        gevent.sleep(0 if i % 2 else i * 5e-6)
        jobs.append(gevent.spawn(second))
        gevent.joinall(jobs, raise_error=True)
        assert contents(file) in wanted
    os.close(fd)


def test_misaligned_write_waits_for_what_is_written_behind(file):
    """Also by a thread, because it makes the file longer."""
    for i in range(10):
        os.truncate(file.name, 0)
        with greenaio.open(file.name, 'r+b', 0, direct=True) as behind:
            behind.write(b'A' * MIB)
            gevent.sleep(0 if i % 2 else i * 5e-6)
            jobs = [gevent.spawn(file.pwrite, b'odd', k * 65536 + 100) for k in range(8)]
            gevent.joinall(jobs, raise_error=True)
        assert contents(file).replace(b'odd', b'AAA') == b'A' * MIB


def test_appender_through_the_cache_loses_nothing_to_a_misaligned_write(file):
    fd = os.open(file.name, os.O_WRONLY | os.O_APPEND)
    os.write(fd, bytes(64))
    jobs = [gevent.spawn(call, *args) for i in range(30) for call, *args in (
        (file.pwrite, b'D' * 40, 65536 + 10), (greenaio.os.write, fd, b'%02d' % i * 50))]
    gevent.joinall(jobs, raise_error=True)
    os.close(fd)
    got = contents(file)
    assert got[:65536 + 64] == pattern(65536) + bytes(10) + b'D' * 40 + bytes(14)
    lines = {got[at:at + 100] for at in range(65536 + 64, len(got), 100)}
    assert lines == {b'%02d' % i * 50 for i in range(30)}


def test_killed_writer_leaves_whole_sectors_and_its_range_free(file):
    for i in range(40):
        writer = gevent.spawn(file.pwrite, b'x' * 700, 65536 + 100)
        gevent.sleep(0 if i % 2 else 0.0002)
        writer.kill()
    while _ranges.held():
        gevent.sleep(0.001)
    assert file.pwrite(b'end', 100) == 3
    got = contents(file)
    want = bytearray(pattern(65536))
    want[100:103] = b'end'
    assert got[:65536] == want
    assert got[65536:] in (b'', bytes(100) + b'x' * 700)


def test_read_only_file_says_ebadf_and_holds_nothing(folder):
    path = os.path.join(folder, 'read-only')
    with open(path, 'wb') as file:
        file.write(bytes(8192))
    with File(path, os.O_RDONLY | os.O_DIRECT) as file:
        with pytest.raises(OSError) as caught:
            file.pwrite(b'abc', 10)
        assert caught.value.errno == errno.EBADF
        assert caught.value.filename == path
    assert not _ranges.held()


def test_full_file_system_is_a_short_write_of_ones_own_bytes(tmp_path):
    mount = tmp_path / 'small'
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f'mount -t tmpfs -o size=64k none {mount} 2>/dev/null'):
        pytest.skip('needs root')
    try:
        with File(mount / 'file', os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
            assert file.pwrite(b'x' * 100000, 3) == 65536 - 3
            assert len(contents(file)) == 65536
    finally:
        os.system(f'umount {mount}')


def test_closed_between_the_steps_it_still_writes_to_its_own_file(folder):
    """
        writer               closer
        reads the sector
                             closes; opens another: must not get the number
        writes the sector
    """
    paths = [os.path.join(folder, name) for name in ('mine', 'victim')]
    for path in paths:
        with open(path, 'wb') as plain:
            plain.write(pattern(65536))
            os.fsync(plain.fileno())
    for delay in (0, 0, 0.0001, 0.0003, 0.001):
        file = File(paths[0], os.O_RDWR | os.O_DIRECT)
        writer = gevent.spawn(file.pwrite, b'mine', 70000)
        gevent.sleep(delay)
        file.close()
        victim = os.open(paths[1], os.O_RDWR)
        assert writer.get(timeout=10) == 4
        os.close(victim)
        with open(paths[0], 'rb') as plain:
            assert plain.read() == pattern(65536) + bytes(70000 - 65536) + b'mine'
        with open(paths[1], 'rb') as plain:
            assert plain.read() == pattern(65536)
        os.truncate(paths[0], 65536)
    assert not _ranges.held()


@pytest.fixture
def busy(folder):
    """Keeps the device busy: what is asked for after this call is done well after it was."""
    path = os.path.join(folder, 'busy')
    with open(path, 'wb') as made:
        made.write(bytes(8 * MIB))
        os.fsync(made.fileno())
    with File(path, os.O_RDONLY | os.O_DIRECT) as file:
        yield lambda: [gevent.spawn(file.pread, 131072, i * 131072) for i in range(60)]


def sparse(path, size=MIB):
    with open(path, 'wb') as made:
        made.truncate(size)


def test_write_that_goes_again_by_a_thread_loses_nothing_to_a_neighbour(folder, busy):
    """
        aligned, into a hole               misaligned, in its first sector
        native AIO says EAGAIN
                                           must wait, though nothing is under way
        by a thread
                                           reads the sector, writes it
    """
    path = os.path.join(folder, 'holes')
    block = aligned_buffer(65536)
    block[:] = b'A' * 65536
    for _ in range(10):
        sparse(path)
        with File(path, os.O_RDWR | os.O_DIRECT) as file:
            jobs = [*busy(), gevent.spawn(file.pwrite, block, 0), gevent.spawn(file.pwrite, b'odd', 100)]
            gevent.joinall(jobs, raise_error=True)
            got = contents(file)[:65536]
        assert got.replace(b'odd', b'AAA') == b'A' * 65536


def test_each_that_holds_a_range_waits_for_the_writes_there(folder):
    """Not only the first, whose range may be another."""
    path, count = os.path.join(folder, 'blocks'), 16
    with open(path, 'wb') as made:
        made.write(bytes(count * MIB))
        os.fsync(made.fileno())
    block = aligned_buffer(MIB)
    block[:] = b'A' * MIB
    with File(path, os.O_RDWR | os.O_DIRECT) as file:
        for _ in range(3):
            jobs = [gevent.spawn(file.pwrite, block, i * MIB) for i in range(1, count)]
            jobs += [gevent.spawn(file.pwrite, b'odd', i * MIB + 100) for i in range(count)]
            gevent.joinall(jobs, raise_error=True)
            got = contents(file)
            assert got[MIB:].replace(b'odd', b'AAA') == b'A' * (len(got) - MIB)
            file.pwrite(bytes(len(got)), 0)


def test_queued_write_that_is_killed_is_not_waited_for(held_disk):
    block = aligned_buffer(4096)
    with File(held_disk.file, os.O_RDWR | os.O_DIRECT) as file:
        file.pwrite(block, 0)
        held_disk.hold()
        odd = gevent.spawn(file.pwrite, b'odd', 7)
        limit = _hub.get_driver().engine.shares[file.device].limit
        writers = [gevent.spawn(file.pwrite, block, 4096 * (i % 100)) for i in range(limit + 10)]
        gevent.sleep(0.05)
        gevent.killall(writers[-5:])            # the kernel never had them
        held_disk.release()
        gevent.joinall([odd, *writers], timeout=20, raise_error=False)
        assert odd.value == 3
        assert file.pwrite(block, 0) == 4096


def test_writes_of_other_files_are_not_waited_for(held_disk):
    block = aligned_buffer(4096)
    with File(held_disk.file, os.O_RDWR | os.O_DIRECT) as held, \
            File(held_disk.file + '.other', os.O_RDWR | os.O_CREAT) as other:
        other.pwrite(bytes(65536), 0)
        other.fsync()
        held.pwrite(block, 0)
        held_disk.hold()
        writer = gevent.spawn(held.pwrite, block, 0)
        gevent.sleep(0.01)
        gevent.spawn(other.fallocate, 0, 0, 4096).get(timeout=20)       # holds a range, and needs no disk
        assert not writer.ready()
        held_disk.release()
        writer.get()


def test_child_forked_while_a_thread_has_the_lock_of_the_ranges():
    """In the child Python ends the other threads before any hook: none may wait for that lock then."""
    run_program('fork_beside_locked_ranges')


@pytest.mark.parametrize('how', ['fork', 'destroy'])
def test_range_of_a_greenlet_that_can_never_go_on_is_given_back(disk_folder, how):
    path = os.path.join(disk_folder, 'ranges')
    with open(path, 'wb') as made:
        made.write(bytes(4 * MIB))
        os.fsync(made.fileno())
    run_program('range_of_lost_greenlet', path, how)


@pytest.mark.parametrize('writing', [False, True], ids=['read', 'write'])
def test_what_goes_again_by_a_thread_does_so_on_its_own_file(folder, busy, writing):
    """
        asks, with RWF_NOWAIT              closes; opens another: must not get the number
        EAGAIN: dirty pages, or a hole
        asks a thread
    """
    mine, victim = (os.path.join(folder, name) for name in ('mine', 'victim'))
    with open(victim, 'wb') as made:
        made.write(b'V' * 65536)
    opened = []
    with open(mine, 'wb') as made:
        if writing:
            made.truncate(MIB)
        else:
            made.write(b'm' * 65536)            # dirty
    file = File(mine, (os.O_RDWR if writing else os.O_RDONLY) | os.O_DIRECT)

    def close():
        file.close()
        opened.extend(os.open(victim, os.O_RDWR) for _ in range(3))

    block = aligned_buffer(4096)
    block[:] = b'W' * 4096
    jobs = busy()
    asked = gevent.spawn(file.pwrite, block, 0) if writing else gevent.spawn(file.pread, 4096, 0)
    gevent.sleep(0)
    gevent.get_hub().loop.run_callback(close)
    gevent.joinall([*jobs, asked], raise_error=True)
    gevent.sleep(0.01)
    for fd in opened:
        os.close(fd)
    with open(mine, 'rb') as one, open(victim, 'rb') as other:
        assert other.read() == b'V' * 65536
        if writing:
            assert one.read(4096) == b'W' * 4096
        else:
            assert asked.value == b'm' * 4096


# The ranges --------------------------------------------------------------------------------------

def hold(file, start, end):
    st = os.stat(file.name)
    return _ranges.hold(file.fileno(), _handle.inode_of(st.st_dev, st.st_ino), start, end)


@pytest.fixture
def inode():
    yield _handle.inode_of(1, 2)
    assert not _ranges.held()


def test_ranges_asked_for_and_given_back_at_random_keep_their_order(inode):
    """Beside a list that looks at all pairs; some are given back before they are granted, as by a kill."""
    choose = random.Random(20261130)
    for _ in range(30):
        ranges = []
        for _ in range(120):
            if ranges and choose.random() < 0.5:
                one = ranges.pop(choose.randrange(len(ranges)))
                one.let_go()
                one.let_go()            # twice is fine
            else:
                start = choose.randrange(100)
                end = choose.choice([start + 1, start + 10, _ranges.EVERYTHING])
                ranges.append(_ranges.Range(inode, start, end))
            if ranges:
                inode.ranges._check()
                assert list(inode.ranges) == ranges[::-1]
        for one in ranges:
            one.let_go()
        assert not _ranges.held()


def test_cost_of_a_range_does_not_grow_with_those_that_wait(inode):
    compared = 0

    class Counting(int):
        def __lt__(self, other):
            nonlocal compared
            compared += 1
            return int(self) < other

    count = 10_000
    ranges = [_ranges.Range(inode, Counting(0), 512) for _ in range(count)]
    for one in ranges[::2]:
        one.let_go()                    # granted, or killed before
    for one in ranges[1::2]:
        assert one.granted
        one.let_go()
    assert compared <= 10 * count
    compared = 0
    ranges = [_ranges.Range(inode, Counting(512 * i), 512 * i + 512) for i in range(count)]
    for one in ranges:                  # these overlap none
        assert one.granted
        one.let_go()
    assert compared <= 10 * count
    compared = 0
    inode.writes.begin(inode)
    ranges = [_ranges.Range(inode, Counting(512 * i), 512 * i + 512) for i in range(count)]
    assert not any(one.granted for one in ranges)
    inode.writes.end()                  # for which all of them have waited
    for one in ranges:
        assert one.granted
        one.let_go()
    assert compared <= 10 * count
    assert not _ranges.held()


def test_range_that_is_given_back_stays_until_its_writes_are_over(inode):
    mine, other = (_ranges.Range(inode, 0, 512) for _ in range(2))
    mine.writes.begin(mine)
    mine.writes.begin(mine)
    mine.let_go()
    mine.writes.end()
    assert not other.granted
    inode.ranges._check()
    mine.writes.end()
    assert other.granted
    other.let_go()


def test_ranges_wait_for_the_writes_that_began_before_the_first_of_them(inode):
    """Also if that one is killed."""
    inode.writes.begin(inode)
    ranges = [_ranges.Range(inode, start, start + 512) for start in (0, 4096)]
    ranges[0].let_go()
    late = _ranges.Range(inode, 8192, 8704)
    inode.ranges._check()
    assert not ranges[1].granted and not late.granted
    inode.writes.end()
    assert ranges[1].granted and late.granted
    ranges[1].let_go()
    late.let_go()


def test_inode_lives_as_long_as_a_write_is_under_way():
    inode = _handle.inode_of(1, 3)
    writes = inode.writes
    writes.begin(inode)
    del inode
    mine = _ranges.Range(_handle.inode_of(1, 3), 0, 512)
    assert not mine.granted
    writes.end()
    assert mine.granted
    mine.let_go()
    del mine, writes
    assert _handle.inode_if_any(1, 3) is None


def test_killed_writers_that_had_not_begun_leave_nothing(file):
    mine = hold(file, 0, 512)
    before = _handle.in_use(file.fileno())
    try:
        writers = [gevent.spawn(file.pwrite, b'odd', i % 100) for i in range(1000)]
        gevent.sleep(0)
        assert len(mine.ranges) == 1001
        assert _hub.get_driver().waiting == 0
        for writer in writers[::2] + writers[1::2]:
            writer.kill()
        assert list(mine.ranges) == [mine]
        assert not list(mine.followers())
        assert _handle.in_use(file.fileno()) == before
        other = gevent.spawn(file.pwrite, b'elsewhere', 4096 + 7)       # overlaps nothing
        assert other.get(timeout=10) == 9
    finally:
        mine.let_go()
    assert contents(file)[:4096] == pattern(65536)[:4096]


def test_misaligned_writes_of_threads_all_succeed(folder):
    """
        thread one              thread two
        holds the sector
                                waits in its own hub, where nothing else is to do
        gives it back, and wakes
        that hub's loop
    """
    path = os.path.join(folder, 'threads')
    with open(path, 'wb') as made:
        made.write(bytes(MIB))
        os.fsync(made.fileno())
    run_program('misaligned_writes_of_threads', path)


def end_thread(work):
    """Do *work* in a thread that ends without destroying its hub, and close the fds of that hub."""
    hubs = []

    def begin():
        hubs.append(gevent.get_hub())
        work()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    hubs[0].loop.destroy()


def test_thread_that_ends_gives_its_range_back_when_the_disk_is_done(held_disk):
    """
        thread                  the disk                main
        misaligned write: reads
                                reads, held
        ends
                                                        writes there: must wait
                                done
                                                        reads the sector, writes it
    """
    with File(held_disk.file, os.O_RDWR | os.O_DIRECT) as file:
        file.pwrite(b'warm', 0)
        held_disk.hold()

        def work():
            gevent.spawn(file.pwrite, b'thread', 100)
            gevent.spawn(file.pwrite, b'queued', 200)
            gevent.sleep(0.01)

        end_thread(work)
        assert not _ranges.held()
        writer = gevent.spawn(file.pwrite, b'main', 300)
        gevent.sleep(0.05)
        assert not writer.ready()
        held_disk.release()
        assert writer.get(timeout=10) == 4
        data = contents(file)[:512]
    assert data[300:304] == b'main'
    assert data[100:106] in (b'thread', pattern(512)[100:106])
    assert data[:100] == b'warm' + pattern(512)[4:100]


def test_threads_end_amidst_their_misaligned_writes_and_nobody_hangs(file):
    for i in range(20):
        def work(i=i):
            gevent.spawn(file.pwrite, b'abc', 5)
            for _ in range(1 + i % 4):
                gevent.sleep(0)

        end_thread(work)
        with gevent.Timeout(10):
            assert file.pwrite(b'abc', 5) == 3
    assert contents(file)[:8] == pattern(8)[:5] + b'abc'


# Calls that change the file without a write -------------------------------------------------------

def changes(path, source):
    """Calls that fill the first 16 bytes, or empty the file; the bytes that are there afterwards."""
    yield 'copy_file_range', b'B' * 16, lambda fd: greenaio.os.copy_file_range(source, fd, 16, 0, 0)
    yield 'sendfile', b'B' * 16, lambda fd: greenaio.os.sendfile(fd, source, 0, 16)
    yield 'at the position', b'B' * 16, lambda fd: greenaio.os.copy_file_range(source, fd, 16, 0)
    yield 'write', b'B' * 16, lambda fd: greenaio.os.pwrite(fd, b'B' * 16, 0)
    yield 'begun', b'B' * 16, lambda fd: streamed(path)
    yield 'open', None, lambda fd: os.close(greenaio.os.open(path, os.O_WRONLY | os.O_TRUNC))
    yield 'open, not cached', None, lambda fd: os.close(greenaio.os.open(path, os.O_WRONLY | os.O_TRUNC))
    yield 'ftruncate', None, lambda fd: greenaio.os.ftruncate(fd, 0)


def evict():
    with open('/proc/sys/vm/drop_caches', 'w') as control:
        control.write('2')


def streamed(path):
    with File(path, os.O_WRONLY) as file:
        begun = file.begin(False, b'B' * 16, 0)
        if begun is None:
            assert file.pwrite(b'B' * 16, 0) == 16
        else:
            assert file.end(begun) == 16


@pytest.mark.parametrize('name', [name for name, *_ in changes('', -1)])
def test_change_of_a_sector_waits_for_the_misaligned_write_that_has_read_it(held_disk, name):
    """
        misaligned write          other call
        reads the sector: held
                                  changes it
        writes the sector: the change is undone
    """
    source = os.open(f'{held_disk.file}.source', os.O_RDWR | os.O_CREAT)
    os.write(source, b'B' * 16)
    plain = os.open(held_disk.file, os.O_RDWR)
    (want, change), = [rest for one, *rest in changes(held_disk.file, source) if one == name]
    with File(held_disk.file, os.O_RDWR | os.O_DIRECT) as file:
        if 'not cached' in name:
            evict()
        else:
            os.stat(held_disk.file)
        held_disk.hold()
        odd = gevent.spawn(file.pwrite, b'odd', 100)
        gevent.sleep(0.05)
        other = gevent.spawn(change, plain)
        gevent.sleep(0.05)
        assert not odd.ready()
        held_disk.release()
        gevent.joinall([odd, other], timeout=20, raise_error=True)
        got = contents(file)
    os.close(plain)
    os.close(source)
    if want is None:
        assert got == b''
    else:
        assert (got[:16], got[100:103], got[16:100] + got[103:]) == (
            want, b'odd', pattern(4 * MIB)[16:100] + pattern(4 * MIB)[103:])


def test_open_that_is_killed_while_it_waits_for_a_range_empties_nothing(file):
    held, fds = hold(file, 0, 512), len(os.listdir('/proc/self/fd'))
    waiting = [gevent.spawn(greenaio.os.open, file.name, os.O_WRONLY | os.O_TRUNC) for _ in range(3)]
    gevent.sleep(0.05)
    assert not any(greenlet.ready() for greenlet in waiting)
    gevent.killall(waiting[:2])
    assert len(os.listdir('/proc/self/fd')) == fds and contents(file) == pattern(65536)
    held.let_go()
    os.close(waiting[2].get(timeout=10))
    assert contents(file) == b''
