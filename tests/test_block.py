"""`BlockDevice` beside a model in memory, on files, loop devices and disks that fail."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import struct
import subprocess
import types

import gevent
import pytest
from gevent.event import Event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import greenaio
from greenaio import block
from greenaio._files import zones as _zones
from greenaio.block import BlockDevice, Zone
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import run, run_python


@pytest.fixture
def image(folder):
    return os.path.join(folder, 'image')


@contextlib.contextmanager
def loop_device(path, *options):
    if os.geteuid() != 0 or shutil.which('losetup') is None:
        missing('needs root and losetup')
    name = run('losetup', '--direct-io=on', *options, '-f', '--show', path).strip()
    try:
        yield name
    finally:
        run('losetup', '-d', name)


class Syncs:
    """In the place of a device's File where it syncs: tells when, waits, fails."""

    def __init__(self, device):
        self.began, self.may_end, self.count, self.error = Event(), Event(), 0, None
        self.may_end.set()
        device._writes._file = self

    def fdatasync(self):
        self.count += 1
        self.began.set()
        self.may_end.wait()
        if self.error:
            raise self.error


class Instead:
    """In the place of a device's File: some of its calls are others."""

    def __init__(self, device, **calls):
        self.file = device._file
        vars(self).update(calls)
        device._file = self

    def __getattr__(self, name):
        return getattr(self.file, name)


# Reading and writing -----------------------------------------------------------------------------

@pytest.mark.parametrize('direct', [True, False])
def test_what_was_written_is_read_whatever_its_place(image, direct):
    data = pattern(MIB)
    with BlockDevice(image, create_size=MIB + 1000, direct=direct) as device:
        assert device.size == MIB + 1000
        for offset, n in ((0, 8192), (8192, 1), (8193, 4095), (12288, 600_000), (700_001, 300), (MIB, 1000)):
            assert device.pwrite(data[:n], offset) == n
            assert device.pread(n, offset) == data[:n]
        device.flush()
    with open(image, 'rb') as file:
        file.seek(12288)
        assert file.read(600_000) == data[:600_000]


def test_aligned_requests_go_to_the_callers_memory(image):
    with BlockDevice(image, create_size=MIB) as device:
        assert 4096 % device.alignment == 0
        buffers = [greenaio.aligned_buffer(4096), greenaio.aligned_buffer(8192)]
        device.pwritev([pattern(8192), pattern(4096)], 4096)
        assert device.preadv(buffers, 4096) == 12288
        assert bytes(buffers[0]) + bytes(buffers[1]) == pattern(8192) + pattern(4096)


@pytest.mark.parametrize('size', [4096, 5000, 512, 0])
def test_past_the_end_are_zeros(image, size):
    with BlockDevice(image, create_size=size) as device:
        device.pwrite(b'x' * size, 0)
        for offset, n in ((0, 8192), (size, 100), (size // 2, 5000), (1 << 40, 10), (4096, 4096)):
            wanted = (b'x' * size)[offset:offset + n].ljust(n, b'\0')
            assert device.pread(n, offset) == wanted
            buffers = [bytearray(b'?' * (n - 3)), bytearray(b'?' * 3)]
            assert device.preadv(buffers, offset) == n
            assert b''.join(buffers) == wanted


def test_many_reads_of_one_greenlet(image):
    data = pattern(MIB)
    ranges = [(4096, i * 4096) for i in range(100)]
    ranges += [(1, 7), (5000, 3), (0, 5), (8192, MIB - 100), (300_000, 0)]
    with BlockDevice(image, create_size=MIB) as device:
        device.pwrite(data, 0)
        assert [bytes(one) for one in device.pread_each(ranges)] == [
            data[offset:offset + n].ljust(n, b'\0') for n, offset in ranges]
        for wrong in ((-1, 0), (4096, -1)):
            with pytest.raises(OSError, match='Invalid'):
                next(device.pread_each([(4096, 0), wrong]))
        with pytest.raises(OSError, match='Invalid'):
            device.preadv([bytearray(10)], -1)
        assert list(device.pread_each([])) == []
    with pytest.raises(ValueError, match='closed'):
        next(device.pread_each([(1, 0)]))


def test_many_reads_abandoned_keep_their_memory(held_disk):
    with BlockDevice(held_disk.file) as device:
        held_disk.hold()
        reader = gevent.spawn(list, device.pread_each([(4096, i * 4096) for i in range(32)]))
        gevent.sleep(0.05)
        reader.kill()
        held_disk.release()
        assert device.pread(4096, 0) == pattern(4096)


def test_many_writes_of_one_greenlet(image):
    data = pattern(MIB)
    writes = [(data[i * 4096:(i + 1) * 4096], i * 4096) for i in range(100)]
    writes += [(data[500_000:], 500_000), (b'', 7), (memoryview(data)[450_001:450_003], 450_001)]
    with BlockDevice(image, create_size=MIB) as device:
        assert list(device.pwrite_each(writes)) == [len(part) for part, _ in writes]
        written = bytearray(MIB)
        for part, offset in writes:
            written[offset:offset + len(part)] = part
        assert device.pread(MIB, 0) == written
        for wrong, message in (((b'x', MIB), 'No space'), ((b'x', -1), 'Invalid')):
            with pytest.raises(OSError, match=message):
                next(device.pwrite_each([(bytes(4096), 0), wrong]))
        assert device.pread(4096, 0) == data[:4096]     # nor the first of them
        assert list(device.pwrite_each([])) == []
    with BlockDevice(image, readonly=True) as device, pytest.raises(OSError, match='Bad file'):
        next(device.pwrite_each([(b'x', 0)]))
    with pytest.raises(ValueError, match='closed'):
        next(device.pwrite_each([(b'x', 0)]))


def test_one_write_of_many_that_fails_harms_no_other(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '-t', 'tmpfs', '-o', 'size=256K', 'greenaio-test', tmp_path)
    try:
        with BlockDevice(tmp_path / 'image', create_size=MIB) as device:
            parts = [(bytes([i]) * 4096, i * 4096) for i in range(100)]
            results = list(device.pwrite_each(parts))
            failed = [one for one in results if isinstance(one, OSError)]
            assert 0 < len(failed) < 100 and {one.errno for one in failed} == {errno.ENOSPC}
            for (part, offset), result in zip(parts, results):
                assert device.pread(4096, offset) == (part if result == 4096 else bytes(4096))
    finally:
        run('umount', tmp_path)


def test_many_writes_given_up_are_never_taken_for_flushed(image):
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        writes = device.pwrite_each([(bytes(4096), i * 4096) for i in range(8)])
        assert next(writes) == 4096
        writes.close()
        for _ in range(2):              # they land whenever they do
            device.flush()
        assert syncs.count == 2
        list(device.pwrite_each([(bytes(4096), 0)]))
        device.flush()
        assert syncs.count == 3


def test_write_past_the_end_writes_nothing(image):
    with BlockDevice(image, create_size=10_000) as device:
        for offset, n in ((10_000, 1), (9_999, 2), (0, 10_001), (1 << 40, 4096)):
            with pytest.raises(OSError, match='No space') as caught:
                device.pwrite(b'x' * n, offset)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, image)
            with pytest.raises(OSError, match='No space'):
                device.write_zeroes(n, offset)
        assert device.pread(10_000, 0) == bytes(10_000)
        assert os.stat(image).st_size == 10_000


def test_full_disk_is_enospc(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '-t', 'tmpfs', '-o', 'size=1M', 'greenaio-test', tmp_path)
    try:
        with BlockDevice(tmp_path / 'image', create_size=8 * MIB) as device:
            device.pwrite(b'x' * 4096, 0)
            with pytest.raises(OSError, match='No space') as caught:    # a short write first
                device.pwrite(b'y' * (4 * MIB), 4096)
            assert caught.value.errno == errno.ENOSPC
            assert device.pread(4097, 0) == b'x' * 4096 + b'y'
    finally:
        run('umount', tmp_path)


def test_neighbours_in_a_sector_lose_nothing(image):
    """A hundred writers of odd ranges, each of which shares its sectors with others."""
    size, generator = 64 << 10, random.Random(1)
    places = [0, *sorted(generator.sample(range(1, size), 99)), size]
    wanted = bytearray(size)
    with BlockDevice(image, create_size=size) as device:
        def write(begin, end):
            for value in range(1, 4):
                device.pwrite(bytes([value + begin % 50]) * (end - begin), begin)
        ranges = list(zip(places, places[1:]))
        generator.shuffle(ranges)
        gevent.joinall([gevent.spawn(write, begin, end) for begin, end in ranges], raise_error=True)
        for begin, end in ranges:
            wanted[begin:end] = bytes([3 + begin % 50]) * (end - begin)
        assert device.pread(size, 0) == wanted


@pytest.mark.parametrize('sector', [512, 4096])
def test_block_device(disk_folder, sector):
    path = os.path.join(disk_folder, 'backing')
    with open(path, 'wb') as file:
        file.truncate(4 * MIB)
    with loop_device(path, '-b', str(sector)) as name, BlockDevice(name) as device:
        assert (device.size, device.alignment) == (4 * MIB, sector)
        device.pwrite(b'a' * 1000, 4000)
        device.pwrite(b'b' * 8192, 8192, fua=True)
        assert device.pread(5000, 4000) == b'a' * 1000 + bytes(3192) + b'b' * 808
        device.write_zeroes(3 * 4096 + 10, 4090)
        assert device.pread(16384, 0) == bytes(4000) + b'a' * 90 + bytes(16384 - 4090)
        device.discard(MIB, 0)
        device.flush()
        assert device.block_status(4096, 0)[0][0] == 4096
        with pytest.raises(OSError, match='No space'):
            device.pwrite(b'x' * 4096, 4 * MIB - 10)
        assert device.pread(4096, 4 * MIB - 10) == bytes(4096)
        with pytest.raises(OSError, match='Invalid argument'):
            device.resize(8 * MIB)


def test_far_offsets(image):
    with BlockDevice(image, create_size=5 << 40) as device:
        for offset in (1 << 32, (1 << 32) - 10, (5 << 40) - 4096):
            device.pwrite(pattern(4096), offset)
            assert device.pread(4096, offset) == pattern(4096)


OPERATIONS = st.lists(st.tuples(
    st.sampled_from(['write', 'zero', 'zero, keep', 'read', 'flush', 'writev', 'fua']),
    st.integers(0, 40_000), st.integers(0, 20_000), st.integers(1, 255)), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS, st.sampled_from([40_000, 32_768, 40_001]), st.booleans())
def test_model(folder, operations, size, direct):
    path, model = os.path.join(folder, 'model'), bytearray(size)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with BlockDevice(path, create_size=size, direct=direct) as device:
        for kind, offset, n, value in operations:
            data = bytes([value]) * n
            if kind == 'flush':
                device.flush()
            elif kind == 'read':
                assert device.pread(n, offset) == bytes(model[offset:offset + n]).ljust(n, b'\0')
            elif offset + n > size:
                with pytest.raises(OSError, match='No space'):
                    device.pwrite(data, offset)
            elif kind.startswith('zero'):
                device.write_zeroes(n, offset, may_unmap=kind == 'zero')
                model[offset:offset + n] = bytes(n)
            else:
                if kind == 'writev':
                    device.pwritev([data[:n // 3], data[n // 3:]], offset)
                else:
                    device.pwrite(data, offset, fua=kind == 'fua')
                model[offset:offset + n] = data
        assert device.pread(size, 0) == model
    with open(path, 'rb') as file:
        assert file.read() == model


def test_same_as_qemu(disk_folder):
    """The same script through ``qemu-io -n -i native`` leaves the same image and reads the same bytes."""
    if shutil.which('qemu-io') is None:
        missing('needs qemu-io')
    size, generator, script = 4 * MIB, random.Random(7), []
    ours, theirs = (os.path.join(disk_folder, name) for name in ('ours', 'theirs'))
    results = []
    with BlockDevice(ours, create_size=size) as device:
        for i in range(300):
            kind = generator.choice(['write', 'write', 'write -z', 'write -f', 'read', 'flush', 'discard'])
            sector = generator.random() < .5
            offset = generator.randrange(0, size - 70_000)
            n = generator.randrange(1, 65_000)
            if sector:
                offset, n = offset & ~511, (n | 511) + 1
            if kind == 'flush':
                script.append('flush')
                device.flush()
            elif kind == 'discard':     # of whole pages alone is anything promised: here nothing is
                script.append('flush')
            elif kind == 'read':
                found = device.pread(n, offset)
                if len(set(found)) == 1:
                    script.append(f'read -P {found[0]} {offset} {n}')
                else:
                    script.append(f'read {offset} {n}')
            elif kind == 'write -z':
                script.append(f'write -z {offset} {n}')
                device.write_zeroes(n, offset)
            else:
                script.append(f'{kind} -P {i % 250 + 1} {offset} {n}')
                device.pwrite(bytes([i % 250 + 1]) * n, offset, fua=kind == 'write -f')
            results.append(kind)
        device.flush()
    assert len(set(results)) == 6
    run('truncate', '-s', size, theirs)
    done = subprocess.run(['qemu-io', '-f', 'raw', '-n', '-i', 'native', theirs], input='\n'.join(script),
                          capture_output=True, text=True, timeout=60, check=True)
    assert 'failed' not in done.stdout + done.stderr, done.stdout[-2000:]
    with open(ours, 'rb') as one, open(theirs, 'rb') as other:
        assert one.read() == other.read()


# Zeros and holes ---------------------------------------------------------------------------------

@pytest.mark.parametrize('may_unmap', [True, False])
@pytest.mark.parametrize('offset, n', [(0, MIB), (4096, 8192), (100, 50), (5000, 100_000),
                                       (MIB - 5000, 5000)])
def test_zeroes_reach_what_is_meant(image, offset, n, may_unmap):
    wanted = bytearray(pattern(MIB))
    with BlockDevice(image, create_size=MIB) as device:
        device.pwrite(wanted, 0)
        before = os.stat(image).st_blocks
        assert device.write_zeroes(n, offset, may_unmap=may_unmap) == n
        device.flush()
        wanted[offset:offset + n] = bytes(n)
        assert device.pread(MIB, 0) == wanted
        if n == MIB and may_unmap:
            assert os.stat(image).st_blocks < before / 2


def test_discard_leaves_what_is_beside(image):
    wanted = pattern(MIB)
    with BlockDevice(image, create_size=MIB) as device:
        device.pwrite(wanted, 0)
        assert device.discard(100_000, 5000) == 100_000
        assert device.pread(5000, 0) == wanted[:5000]
        assert device.pread(MIB - 105_000, 105_000) == wanted[105_000:]
        device.discard(10, 10)          # no whole page: nothing
        assert device.pread(5000, 0) == wanted[:5000]


def test_status_tells_data_from_holes(image):
    with BlockDevice(image, create_size=4 * MIB) as device:
        assert device.block_status(4 * MIB, 0) == [(4 * MIB, False)]
        device.pwrite(b'x' * 65536, MIB)
        device.flush()
        assert device.block_status(4 * MIB, 0) == [(MIB, False), (65536, True), (3 * MIB - 65536, False)]
        assert device.block_status(100, MIB + 50) == [(100, True)]
        assert device.block_status(0, MIB) == []


def test_status_of_many_extents_comes_in_parts(image, monkeypatch):
    """And each zone was written up to the last of its data, wherever that lies in the extents."""
    pieces = [(i * 12288, 4096 + 4096 * (i % 2)) for i in range(1500)]
    with open(image, 'wb') as file:
        file.truncate(18 * MIB)
        for offset, n in pieces:
            os.pwrite(file.fileno(), b'x' * n, offset)
    with BlockDevice(image) as device:
        found, offset = [], 0
        while offset < device.size:
            extents = device.block_status(device.size - offset, offset)
            assert extents and len(extents) <= 1024
            for n, is_data in extents:
                if is_data:
                    found.append((offset, n))
                offset += n
        assert (found, offset) == (pieces, device.size)
    monkeypatch.setattr(_zones, 'AT_ONCE', 100)
    with BlockDevice(image, zone_size=28672) as device:
        for zone in device.zones():
            ends = [min(offset + n, zone.offset + zone.capacity) for offset, n in pieces
                    if offset < zone.offset + zone.capacity and offset + n > zone.offset]
            assert zone.write_pointer == max(ends, default=zone.offset)


def test_resize(image):
    with BlockDevice(image, create_size=MIB) as device:
        device.pwrite(b'x' * MIB, 0)
        device.resize(5000)
        assert (device.size, os.stat(image).st_size) == (5000, 5000)
        device.resize(MIB)
        assert device.pread(10_000, 0) == b'x' * 5000 + bytes(5000)
        for n in (-1, 1 << 63):
            with pytest.raises((OSError, OverflowError)):
                device.resize(n)


# Flush -------------------------------------------------------------------------------------------

def test_flush_of_nothing_costs_nothing(image):
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        device.flush()
        device.pread(4096, 0)
        device.flush()
        assert syncs.count == 0
        device.pwrite(b'x', 0)
        device.flush()
        device.flush()
        assert syncs.count == 1
        device.write_zeroes(5000, 0)
        device.flush()
        device.discard(5000, 0)
        device.flush()
        assert syncs.count == 3


def test_one_sync_serves_all_who_came_before_it(image):
    """
        first           second and third        device
        flush                                   sync 1 begins
                        write, flush            (sync 1 is not for these writes)
                                                sync 1 ends
        goes on                                 sync 2 begins
                                                sync 2 ends
                        both go on
    """
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        syncs.may_end.clear()
        device.pwrite(b'1', 0)
        first = gevent.spawn(device.flush)
        assert syncs.began.wait(5)

        def write_and_flush():
            device.pwrite(b'2', 4096)
            device.flush()

        others = [gevent.spawn(write_and_flush) for _ in range(2)]
        gevent.sleep(0.05)
        assert syncs.count == 1
        assert not first.ready()
        syncs.began.clear()
        syncs.may_end.set()
        first.get(timeout=5)
        gevent.joinall(others, timeout=5, raise_error=True)
        assert syncs.count == 2


def test_hundreds_of_flushes_share(image):
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)

        def work(i):
            device.pwrite(bytes(4096), 4096 * (i % 256))
            device.flush()

        gevent.joinall([gevent.spawn(work, i) for i in range(300)], raise_error=True)
        assert 1 <= syncs.count < 150


def test_killed_leader_leaves_its_followers_their_answer(image):
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        syncs.may_end.clear()
        device.pwrite(b'1', 0)
        leader, follower = gevent.spawn(device.flush), gevent.spawn(device.flush)
        assert syncs.began.wait(5)
        leader.kill()
        assert not follower.ready()
        syncs.may_end.set()
        follower.get(timeout=5)
        assert syncs.count == 1


def test_failed_flush_stays_failed(image):
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        syncs.may_end.clear()
        syncs.error = OSError(errno.EIO, 'Input/output error', image)
        device.pwrite(b'1', 0)
        waiting = [gevent.spawn(device.flush) for _ in range(3)]
        assert syncs.began.wait(5)
        syncs.may_end.set()
        for one in waiting:
            with pytest.raises(OSError, match='Input/output') as caught:
                one.get(timeout=5)
            assert caught.value.filename == image
        syncs.error = None
        with pytest.raises(OSError, match='Input/output'):      # the kernel would say yes now
            device.flush()
        assert syncs.count == 1


def test_killed_write_is_never_taken_for_flushed(image):
    """It may land between the flush and whatever comes then, so a flush may not be left out any more."""
    with BlockDevice(image, create_size=MIB) as device:
        syncs = Syncs(device)
        write = gevent.spawn(device.pwrite, bytes(4096), 0)
        gevent.sleep(0)
        write.kill()
        killed = isinstance(write.value, gevent.GreenletExit)
        for _ in range(2):
            device.flush()
        assert syncs.count == (2 if killed else 1)


@contextlib.contextmanager
def disk_without_room(folder):
    """A loop device whose backing file finds no room: written back is 1 MiB of it or so."""
    if os.geteuid() != 0 or shutil.which('losetup') is None:
        missing('needs root and losetup')
    run('mount', '-t', 'tmpfs', '-o', 'size=2M', 'greenaio-test', folder)
    try:
        with open(folder / 'backing', 'wb') as file:
            file.truncate(16 * MIB)
        name = run('losetup', '-f', '--show', folder / 'backing').strip()
        try:
            with BlockDevice(name, direct=False) as device:
                for offset in range(0, 8 * MIB, MIB):
                    device.pwrite(pattern(MIB), offset)
                yield name, device
        finally:
            run('losetup', '-d', name)
    finally:
        for _ in range(50):
            if subprocess.run(['umount', folder], capture_output=True, check=False).returncode == 0:
                break
            gevent.sleep(0.05)


def test_sync_that_really_fails(tmp_path, disk_folder):
    with disk_without_room(tmp_path) as (_, device):
        for _ in range(2):
            with pytest.raises(OSError, match='Input/output|No space'):
                device.flush()


def test_fua_write_that_hears_of_lost_pages_fails_the_flush(tmp_path):
    """Once per open file is a writeback's error told, and here not to the flush."""
    with disk_without_room(tmp_path) as (name, device):
        with open(name, 'rb+') as other, contextlib.suppress(OSError):
            os.fdatasync(other)
        with pytest.raises(OSError, match='Input/output|No space'):
            device.pwrite(bytes(4096), 0, fua=True)
        for _ in range(2):
            with pytest.raises(OSError, match='Input/output|No space'):
                device.flush()


@pytest.mark.parametrize('code', [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENODEV, errno.EINVAL,
                                  errno.EFBIG, errno.EBADF, errno.ECANCELED])
@pytest.mark.parametrize('by_itself', [True, False])
def test_fua_write_that_failed_fails_the_flush_unless_it_was_refused(image, code, by_itself):
    """*by_itself*: RWF_DSYNC is known. Where it is not, what a sync says is never about arguments."""
    def pwritev(buffers, offset, flags=0):
        if flags:
            raise OSError(code if by_itself else errno.EOPNOTSUPP, 'of the write', image)
        return len(buffers[0])

    def fdatasync():
        if not by_itself:
            raise OSError(code, 'of the sync', image)

    with BlockDevice(image, create_size=MIB) as device:
        Instead(device, pwritev=pwritev, fdatasync=fdatasync)
        with pytest.raises(OSError, match='of the') as caught:
            device.pwrite(bytes(4096), 0, fua=True)
        assert caught.value.errno == code
        harmless = (errno.ECANCELED, *((errno.EINVAL, errno.EFBIG, errno.EBADF) if by_itself else ()))
        for _ in range(2):
            with contextlib.nullcontext() if code in harmless else pytest.raises(OSError, match='of the'):
                device.flush()


def test_flush_hears_what_a_killed_fua_write_is_told(image):
    """
        writer                  flusher                 kernel
        write, fua
        is killed
                                flush                   sync: all was well, or it was told already
                                                        write: EIO, and of what was written before
                                EIO
    """
    with BlockDevice(image, create_size=MIB) as device:
        syncs, began, may_end = Syncs(device), Event(), Event()

        def pwritev(buffers, offset, flags=0):
            began.set()
            may_end.wait()
            raise OSError(errno.EIO, 'Input/output error', image)

        device.pwrite(b'before', 8192)
        Instead(device, pwritev=pwritev)
        writer = gevent.spawn(device.pwrite, bytes(4096), 0, fua=True)
        assert began.wait(5)
        writer.kill()
        flusher = gevent.spawn(device.flush)
        assert syncs.began.wait(5)
        gevent.sleep(0.01)
        assert not flusher.ready()
        may_end.set()
        with pytest.raises(OSError, match='Input/output'):
            flusher.get(timeout=5)


def test_fua_is_durable_without_a_flush(image):
    """On the disk by RWF_DSYNC; where that is refused, by a sync after the write."""
    with BlockDevice(image, create_size=MIB) as device:
        file = device._file

        class Refusing:
            syncs = 0

            def __getattr__(self, name):
                return getattr(file, name)

            def pwritev(self, buffers, offset, flags=0):
                if flags:
                    raise OSError(errno.EOPNOTSUPP, 'Operation not supported')
                return file.pwritev(buffers, offset)

            def fdatasync(self):
                self.syncs += 1
                file.fdatasync()

        device.pwrite(pattern(4096), 0, fua=True)
        device._file = Refusing()
        device.pwrite(pattern(8192), 4096, fua=True)
        assert device._file.syncs == 1
        device._file = file
        assert device.pread(12288, 0) == pattern(4096) + pattern(8192)


# Zones -------------------------------------------------------------------------------------------

def test_appends_go_one_behind_the_other(image):
    with BlockDevice(image, create_size=4 * MIB, zone_size=MIB) as device:
        assert device.zones() == [Zone(i * MIB, MIB, i * MIB) for i in range(4)]
        landed = {}

        def append(i):
            data = bytes([i]) * (4096 * (i % 3 + 1))
            landed[i] = device.zone_append(data, MIB), data

        gevent.joinall([gevent.spawn(append, i) for i in range(64)], raise_error=True)
        expected = MIB
        for where, data in sorted(landed.values()):
            assert where == expected
            assert device.pread(len(data), where) == data
            expected += len(data)
        assert device.zones()[1] == Zone(MIB, MIB, expected)
        assert device.zones()[0].write_pointer == 0


def test_full_zone_refuses_and_a_reset_one_takes(image):
    with BlockDevice(image, create_size=2 * MIB, zone_size=MIB) as device:
        assert device.zone_append(b'x' * (MIB - 4096), 0) == 0
        with pytest.raises(OSError, match='No space') as caught:
            device.zone_append(b'y' * 4097, 0)
        assert caught.value.errno == errno.ENOSPC
        assert device.zone_append(b'z' * 4096, 0) == MIB - 4096
        with pytest.raises(OSError, match='No space'):
            device.zone_append(b'!', 0)
        assert device.pread(4096, MIB) == bytes(4096)       # the next zone is another's
        device.zone_reset(0)
        assert device.zone_append(b'new', 0) == 0
        assert device.pread(10, 0) == b'new' + bytes(7)
        for offset in (1, 4096, 2 * MIB, -MIB):
            with pytest.raises(OSError, match='zone begins|Invalid'):
                device.zone_append(b'x', offset)


def test_write_pointers_are_found_again(image):
    with BlockDevice(image, create_size=4 * MIB, zone_size=MIB) as device:
        device.zone_append(b'x' * 8192, 0)
        device.zone_append(b'x' * MIB, 2 * MIB)
        device.zone_append(b'x' * 4096, 3 * MIB)
        device.zone_reset(3 * MIB)
        device.flush()
    with BlockDevice(image, zone_size=MIB) as device:
        assert [zone.write_pointer for zone in device.zones()] == [8192, MIB, 3 * MIB, 3 * MIB]


def test_zoned_image_keeps_its_size(image):
    with BlockDevice(image, create_size=2 * MIB, zone_size=MIB) as device:
        for n in (MIB, 4 * MIB):
            with pytest.raises(OSError, match='Invalid'):
                device.resize(n)
        assert (device.size, os.stat(image).st_size) == (2 * MIB, 2 * MIB)
        device._size = MIB + 4096
        with pytest.raises(OSError, match='No space'):      # nor does it grow, whatever a zone says
            device.zone_append(bytes(8192), MIB)
        assert device.zone_append(bytes(4096), MIB) == MIB


def hold_punching(device, monkeypatch):
    """Events: a hole is about to be made in *device*, and it may be."""
    began, may_end, fallocate = Event(), Event(), device._fallocate

    def held(*arguments):
        began.set()
        may_end.wait()
        return fallocate(*arguments)

    monkeypatch.setattr(device, '_fallocate', held)
    return began, may_end


def test_reset_and_appends_wait_for_each_other(image, monkeypatch):
    """
        appends                 reset                   the zone
        two begin                                       two ranges taken
                                waits for them
        a third waits for that
        the two are written
                                makes a hole            empty
        the third is written                            has the third
    """
    with BlockDevice(image, create_size=2 * MIB, zone_size=MIB) as device:
        write_all, may_write = device._write_all, Event()
        punches, may_punch = hold_punching(device, monkeypatch)

        def held(*arguments):
            may_write.wait()
            write_all(*arguments)

        monkeypatch.setattr(device, '_write_all', held)
        before = [gevent.spawn(device.zone_append, b'old' * 4096, 0) for _ in range(2)]
        gevent.sleep(0)
        reset = gevent.spawn(device.zone_reset, 0)
        gevent.sleep(0.01)
        assert device.zones()[0].write_pointer == 2 * 3 * 4096      # appends are beside each other
        after = gevent.spawn(device.zone_append, b'new!' * 4096, 0)
        gevent.sleep(0.01)
        assert not punches.is_set()
        may_write.set()
        assert [one.get(timeout=5) for one in before] == [0, 3 * 4096]
        assert punches.wait(5)
        gevent.sleep(0.01)
        assert not after.ready()
        may_punch.set()
        reset.get(timeout=5)
        assert after.get(timeout=5) == 0
        assert device.zones()[0].write_pointer == 16384
        assert device.pread(32768, 0) == b'new!' * 4096 + bytes(16384)


def test_killed_reset_and_who_waits_for_it_still_happen(image, monkeypatch):
    with BlockDevice(image, create_size=MIB, zone_size=MIB) as device:
        device.zone_append(b'old!' * 4096, 0)
        punches, may_punch = hold_punching(device, monkeypatch)
        reset = gevent.spawn(device.zone_reset, 0)
        assert punches.wait(5)
        killed, waiting = [gevent.spawn(device.zone_append, one * 4096, 0) for one in (b'1', b'2')]
        gevent.sleep(0)
        gevent.killall([reset, killed])
        gevent.sleep(0.01)
        assert not waiting.ready()
        may_punch.set()
        assert waiting.get(timeout=5) == 4096
        device.zone_append(b'3' * 4096, 0)
        assert device.pread(16384, 0) == b'1' * 4096 + b'2' * 4096 + b'3' * 4096 + bytes(4096)


def test_failed_reset_empties_nothing_and_holds_nothing(image, monkeypatch):
    with BlockDevice(image, create_size=MIB, zone_size=MIB) as device:
        device.zone_append(b'old!' * 1024, 0)
        monkeypatch.setattr(device, '_fallocate', lambda *arguments: False)
        with pytest.raises(OSError, match='not supported'):
            device.zone_reset(0)
        assert device.zone_append(b'new!' * 1024, 0) == 4096
        assert device.pread(4, 0) == b'old!'


def test_killed_append_keeps_its_range(image):
    with BlockDevice(image, create_size=MIB, zone_size=MIB) as device:
        one = gevent.spawn(device.zone_append, b'1' * 65536, 0)
        gevent.sleep(0)
        one.kill()
        assert device.zone_append(b'2' * 4096, 0) == 65536
        gevent.sleep(0.05)
        assert device.pread(4096, 65536) == b'2' * 4096


def test_failed_append_gives_its_range_back(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '-t', 'tmpfs', '-o', 'size=1M', 'greenaio-test', tmp_path)
    try:
        with BlockDevice(tmp_path / 'image', create_size=16 * MIB, zone_size=8 * MIB) as device:
            with pytest.raises(OSError, match='No space'):
                device.zone_append(b'x' * (4 * MIB), 0)
            assert device.zones()[0].write_pointer == 0
    finally:
        run('umount', tmp_path)


def test_zones_of_the_kernel(monkeypatch):
    """What BLKREPORTZONE says: a conventional zone, an empty, a half written, a full one."""
    zones = [(0, 128, 2 ** 64 - 1, 1, 128), (128, 128, 128, 2, 96), (256, 128, 300, 2, 96),
             (384, 128, 512, 2, 96)]

    def ioctl(fd, number, argument):
        assert number == _zones.BLKREPORTZONE
        first, room, _ = _zones.REPORT.unpack_from(argument)
        assert len(argument) == 16 + 64 * room
        found = [zone for zone in zones if zone[0] >= first][:room]
        told = [_zones.ZONE.pack(start, length, pointer, kind, 0, 0, 0, capacity)
                for start, length, pointer, kind, capacity in found]
        return (_zones.REPORT.pack(first, len(found), 1) + b''.join(told)).ljust(len(argument), b'\0')

    monkeypatch.setattr(_zones, '_calls', types.SimpleNamespace(ioctl=ioctl))
    monkeypatch.setattr(_zones, 'AT_ONCE', 2)
    found = [(zone.offset, zone.end, zone.write_pointer) for zone in _zones._reported(-1, 0, 512 * 512)]
    assert found == [(128 * 512, 224 * 512, 128 * 512), (256 * 512, 352 * 512, 300 * 512),
                     (384 * 512, 480 * 512, 480 * 512)]
    assert len(_zones._reported(-1, 256 * 512, 384 * 512)) == 1


def test_zone_of_the_kernel_is_reset_by_an_ioctl(image, monkeypatch):
    """The device is simulated. It refuses the first time."""
    asked = []

    def ioctl(fd, number, argument):
        asked.append((number, _zones.RANGE.unpack(argument)))
        if len(asked) == 1:
            raise OSError(errno.EIO, 'no')
        return argument

    with BlockDevice(image, create_size=2 * MIB, zone_size=MIB) as device:
        device.zone_append(bytes(4096), MIB)
        monkeypatch.setattr(device._zones, '_is_kernels', True)
        monkeypatch.setattr(_zones, '_calls', types.SimpleNamespace(ioctl=ioctl))
        with pytest.raises(OSError, match='no'):
            device.zone_reset(MIB)
        assert device.zones()[1].write_pointer == MIB + 4096
        device.zone_reset(MIB)
        assert device.zones()[1].write_pointer == MIB
    assert asked == [(_zones.BLKRESETZONE, (MIB // 512, MIB // 512))] * 2


# Limits ------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """A time that passes only when somebody sleeps."""
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(block, 'time', clock)
    monkeypatch.setattr(block.gevent, 'sleep', clock.sleep)
    return clock


@pytest.mark.parametrize('limits, n, seconds', [
    ({'iops': 100}, 1000, 10), ({'bps': 4096 * 50}, 500, 10), ({'iops': 100, 'bps': 4096 * 50}, 500, 10),
    ({'iops': 50, 'bps': 4096 * 500}, 500, 10)])
def test_throttled_device_keeps_to_its_rate(image, clock, limits, n, seconds):
    with BlockDevice(image, create_size=MIB, **limits) as device:
        for i in range(n):
            if i % 2:
                device.pread(4096, 0)
            else:
                device.pwrite(bytes(4096), 0)
        assert clock.now - 1000 == pytest.approx(seconds, abs=2 * block.BURST)


def test_killed_waiter_takes_nothing_of_the_rate(image):
    with BlockDevice(image, create_size=MIB, iops=20) as device:
        for _ in range(3):              # what is allowed at once
            device.pread(512, 0)
        gone = [gevent.spawn(device.pread, 512, 0) for _ in range(1000)]
        gevent.sleep(0)
        gevent.killall(gone)
        with gevent.Timeout(10):        # a thousand were 50 s
            device.pread(512, 0)


def test_what_is_refused_waits_for_nothing_and_costs_nothing(image, clock):
    with BlockDevice(image, create_size=MIB, zone_size=MIB // 2, iops=10, bps=MIB) as device:
        device.zone_append(bytes(MIB // 2), 0)
        free = list(device._throttle._free)
        huge = 1 << 62
        refused = [lambda: device.preadv([bytearray(4096)], -1), lambda: device.zone_append(b'x', 0),
                   lambda: device.zone_append(b'x', 4096), lambda: device.zone_append(bytes(MIB), MIB // 2)]
        for n, offset in ((huge, 0), (-huge, 0), (4096, -1), (4096, 1 << 63), (4096, (1 << 63) - 4095)):
            refused += [lambda n=n, offset=offset: device.pread(n, offset),
                        lambda n=n, offset=offset: next(device.pread_each([(n, offset)]))]
        for call in refused:
            with pytest.raises((OSError, MemoryError)):
                call()
        device.close()
        for call in (lambda: device.pread(4096, 0), lambda: device.preadv([bytearray(4096)], 0),
                     lambda: next(device.pread_each([(4096, 0)]))):
            with pytest.raises(ValueError, match='closed'):
                call()
        assert (clock.now, device._throttle._free) == (1000, free)


# What is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [{'zone_size': 1000}, {'create_size': 1 << 63}, {'create_size': 1.5}])
def test_image_that_could_not_be_made_is_not_there(image, options):
    options = {'create_size': 4096, **options}
    with pytest.raises((ValueError, OverflowError, TypeError)):
        BlockDevice(image, **options)
    assert not os.path.exists(image)
    with open(image, 'wb') as file:
        file.write(b'before')
    with pytest.raises(FileExistsError):
        BlockDevice(image, **options)
    del options['create_size']
    with contextlib.suppress(ValueError):
        BlockDevice(image, **options).close()
    with open(image, 'rb') as file:
        assert file.read() == b'before'


def test_image_is_not_there_where_o_direct_is_refused(tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '-t', 'ramfs', 'greenaio-test', tmp_path)
    try:
        with pytest.raises(OSError, match='Invalid'):
            BlockDevice(tmp_path / 'image', create_size=4096)
        BlockDevice(tmp_path / 'image', create_size=4096, direct=False).close()
        with pytest.raises(FileExistsError):
            BlockDevice(tmp_path / 'image', create_size=4096)
        with pytest.raises(OSError, match='Invalid'):
            BlockDevice(tmp_path / 'image')
        assert os.path.exists(tmp_path / 'image')
    finally:
        run('umount', tmp_path)


def test_bad_arguments(image):
    for options in ({'iops': 0}, {'bps': -1}, {'zone_size': 0}, {'create_size': -1}, {'zone_size': 1000},
                    {'max_batch': 0}, {'create_size': 1, 'readonly': True}):
        with pytest.raises(ValueError):     # noqa: PT011
            BlockDevice(image, **{'create_size': 4096, **options})
    with pytest.raises(FileNotFoundError):
        BlockDevice(image)
    with pytest.raises(OSError, match='Block device required'):
        BlockDevice(os.path.dirname(image), readonly=True, direct=False)
    with pytest.raises(OSError, match='Block device required'):
        BlockDevice('/dev/null', direct=False)
    with BlockDevice(image, create_size=4096) as device:
        with pytest.raises(FileExistsError):
            BlockDevice(image, create_size=4096)
        for call in (lambda: device.pread(-1, 0), lambda: device.pread(1, -1),
                     lambda: device.pwrite(b'x', -1),
                     lambda: device.write_zeroes(-1, 0), lambda: device.discard(1, -5),
                     lambda: device.block_status(-1, 0)):
            with pytest.raises(OSError, match='Invalid argument'):
                call()
        for call in (lambda: device.pwrite('text', 0), lambda: device.preadv([b'constant'], 0),
                     lambda: device.pread('x', 0)):
            with pytest.raises((TypeError, BufferError)):
                call()
    for call in (lambda: device.pread(1, 0), lambda: device.pwrite(b'x', 0), device.flush,
                 lambda: device.size, lambda: device.zone_append(b'x', 0)):
        with pytest.raises(ValueError, match='closed'):
            call()
    device.close()
    assert 'closed' in repr(device)


def test_readonly(image):
    with BlockDevice(image, create_size=4096) as device:
        device.pwrite(b'x' * 4096, 0)
    with BlockDevice(image, readonly=True) as device:
        assert device.readonly
        assert device.pread(4096, 0) == b'x' * 4096
        for call in (lambda: device.pwrite(b'y', 0), lambda: device.write_zeroes(1, 0),
                     lambda: device.discard(1, 0),
                     lambda: device.zone_append(b'y', 0)):
            with pytest.raises(OSError, match='Bad file descriptor') as caught:
                call()
            assert caught.value.errno == errno.EBADF
        device.flush()


def test_without_the_extension(tmp_path):
    run_python('''
        from greenaio.block import BlockDevice
        with BlockDevice(sys.argv[1], create_size=100_000, zone_size=4096) as device:
            device.pwrite(b'x' * 5000, 3)
            device.write_zeroes(10, 10, fua=True)
            device.discard(100, 0)
            device.flush()
            wanted = bytes(3) + b'x' * 7 + bytes(10) + b'x' * 4983
            assert device.pread(200_000, 0) == wanted.ljust(200_000, b'\\0')
            assert device.zone_append(b'z', 8192) == 8192
        with BlockDevice(sys.argv[1]) as device:
            device.resize(10)
    ''', tmp_path / 'image', extension=False)


# Power cuts --------------------------------------------------------------------------------------

BLOCKS, WRITERS = 256, 16
SHUTDOWN = 0x8004587d           # ioctl of ext4 and xfs; with 2 the end of the journal is lost too


def content(number, version):
    return struct.pack('<QQ', number, version) * 256


@pytest.mark.parametrize('fua', [False, True])
@pytest.mark.parametrize('kind', ['ext4', 'xfs'])
def test_what_was_flushed_survives_a_power_cut(kind, fua, tmp_path):
    if shutil.which(f'mkfs.{kind}') is None:
        missing(f'needs mkfs.{kind}')
    disk, mount = tmp_path / 'disk', tmp_path / 'mnt'
    with open(disk, 'wb') as file:
        file.truncate(512 * MIB)
    mount.mkdir()
    generator = random.Random(7)
    survived = 0
    with loop_device(disk) as loop:
        run(f'mkfs.{kind}', '-q', loop)
        for _ in range(4):
            started, durable = [0] * BLOCKS, [0] * BLOCKS
            run('mount', loop, mount)
            try:
                cut_power(mount, generator, fua, started, durable)
            finally:
                unmount(mount)
            run('mount', loop, mount)   # the journal is replayed
            try:
                with BlockDevice(mount / 'image') as device:
                    for i in range(BLOCKS):
                        found = device.pread(4096, i * 4096)
                        if started[i] == durable[i]:
                            assert found == (content(i, durable[i]) if durable[i] else bytes(4096)), i
                        else:           # those under way may be torn, and old ones are no more
                            versions = {struct.unpack_from('<Q', found, at)[0] for at in range(8, 4096, 16)}
                            assert versions <= set(range(durable[i], started[i] + 1)), i
                os.unlink(mount / 'image')
            finally:
                unmount(mount)
            survived += sum(map(bool, durable))
    assert survived > 200


def unmount(mount):
    for attempt in range(50):           # busy for as long as the last requests come home
        try:
            run('umount', mount)
            return
        except subprocess.CalledProcessError:
            if attempt == 49:
                raise
            gevent.sleep(0.1)


def cut_power(mount, generator, fua, started, durable):
    device = BlockDevice(mount / 'image', create_size=BLOCKS * 4096)
    is_off = False

    def write(who):
        while True:
            i = generator.randrange(BLOCKS // WRITERS) * WRITERS + who
            started[i] += 1
            version = started[i]
            try:
                device.pwrite(content(i, version), i * 4096, fua=fua)
                if not fua:
                    device.flush()
            except OSError:
                assert is_off
                return
            if is_off:
                return
            durable[i] = version

    writers = [gevent.spawn(write, who) for who in range(WRITERS)]
    gevent.sleep(generator.uniform(0.1, 0.4))
    with gevent.Timeout(30):            # not by time alone: a busy machine has written little by then
        while sum(map(bool, durable)) < 60:
            gevent.sleep(0.01)
    folder = os.open(mount, os.O_RDONLY)
    is_off = True
    fcntl.ioctl(folder, SHUTDOWN, struct.pack('I', 2))
    os.close(folder)
    gevent.joinall(writers, timeout=20, raise_error=True)
    assert all(writer.ready() for writer in writers)
    device.close()
