"""In order: several requests under way ahead of the reader and behind the writer; and copies."""

import errno
import gc
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import threading

import gevent
import pytest
from test_file import SECCOMP

import greenaio
from greenaio._core import hub as _hub
from greenaio._files import copies, streams
from greenaio._files import loop as _loop
from tests.support import missing
from tests.support.disks import MIB, pattern
from tests.support.processes import run_python

# The numbers of system calls.
COPY_FILE_RANGE, PREADV2, PREAD64 = (326, 327, 17) if os.uname().machine == 'x86_64' else (285, 286, 67)


@pytest.fixture(params=['tmpfs', 'ext4'])
def small_disk(request, disk_folder):
    """A file system with room for 4 MiB."""
    if os.geteuid() != 0:
        missing('needs root')
    image = os.path.join(disk_folder, 'image')
    with tempfile.TemporaryDirectory() as folder:
        if request.param == 'ext4':
            with open(image, 'wb') as file:
                file.truncate(5 * MIB)
            subprocess.run(['mkfs.ext4', '-q', '-m', '0', '-O', '^has_journal', image], check=True)
            subprocess.run(['mount', '-o', 'loop', image, folder], check=True)
        else:
            subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4M', 'tmpfs', folder], check=True)
        try:
            yield folder
        finally:
            gc.collect()
            for attempt in range(50):       # what was abandoned may keep a file open a little longer
                if subprocess.run(['umount', folder], check=attempt == 49).returncode == 0:
                    break
                gevent.sleep(0.1)


def fill(folder):
    """Leave no room there; return the path of the file to delete to have room again."""
    path = os.path.join(folder, 'ballast')
    with open(path, 'wb', buffering=0) as file:
        for step in (MIB, 65536, 4096):
            try:
                while file.write(bytes(step)) == step:
                    os.fsync(file.fileno())
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


def make(folder, nbytes, name='data'):
    path = os.path.join(folder, name)
    with open(path, 'wb') as file:
        file.write(pattern(nbytes + 8)[:nbytes])
        file.flush()
        os.fsync(file.fileno())
    return path


# Reading ahead -----------------------------------------------------------------------------------

@pytest.mark.parametrize('nbytes', [0, 1, 4095, 4096, 131072, 131073, 3 * MIB + 777])
@pytest.mark.parametrize('step', [1000, 4096, 131072, 700001])
def test_reads_in_order_give_the_file(folder, nbytes, step):
    path = make(folder, nbytes)
    for prefetch in (None, 0, 1, 3):
        with greenaio.open(path, 'rb', buffering=0, direct=True, prefetch=prefetch) as file:
            chunks = []
            while chunk := file.read(step):
                chunks.append(chunk)
            assert b''.join(chunks) == pattern(nbytes + 8)[:nbytes]
            assert file.tell() == os.lseek(file.fileno(), 0, os.SEEK_CUR) == nbytes
            assert file.read(1) == b''


def test_begins_when_in_order_grows_and_stops_when_not(disk_folder):
    path = make(disk_folder, 4 * MIB)
    with greenaio.open(path, 'rb', buffering=0, direct=True) as file:
        ahead, widths = file._ahead, []
        file.read(4096)
        assert len(ahead._blocks) == 0
        for _ in range(200):
            file.read(8192)
            widths.append(len(ahead._blocks))
        assert widths[0] == 1
        assert max(widths) == streams.DEPTH
        assert sorted(set(widths)) == [1, 2, 4, 8]
        file.seek(3 * MIB)
        assert file.read(8) == pattern(4 * MIB)[3 * MIB:3 * MIB + 8]
        assert len(ahead._blocks) == 0


def test_blocks_follow_what_is_read_at_a_time_within_bounds(disk_folder):
    path = make(disk_folder, 8 * MIB)
    for step, block in ((512, streams.BLOCK_MIN), (200_000, 262_144), (4 * MIB, streams.BLOCK_MAX)):
        with greenaio.open(path, 'rb', buffering=0, direct=True, prefetch=2) as file:
            file.read(step)
            file.read(step)
            assert {len(one.memory) for one in list(file._ahead._blocks)[1:]} <= {block}
            assert len(file._ahead._blocks) <= 2


def test_buffered_files_too_when_asked(folder):
    path = make(folder, 2 * MIB)
    with greenaio.open(path, 'rb', prefetch=4) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read(100) == pattern(2 * MIB)[:100]
        assert len(file.raw._ahead._blocks) > 0
        assert file.read() == pattern(2 * MIB)[100:]


def test_file_that_grows_is_read_on(folder):
    path = make(folder, 100_000)
    with greenaio.open(path, 'rb', buffering=0, direct=True, prefetch=4) as file:
        assert len(file.read()) == 100_000
        with open(path, 'ab') as other:
            other.write(b'more')
        assert file.read() == b'more'


def test_killed_while_it_waits_for_a_block_it_can_go_on(held_disk):
    with greenaio.open(held_disk.file, 'rb', buffering=0, direct=True) as file:
        data = [file.read(65536) for _ in range(3)]
        held_disk.hold()
        for _ in range(3):
            with gevent.Timeout(0.05, False):
                while True:
                    data.append(file.read(65536))
        held_disk.release()
        while chunk := file.read(65536):
            data.append(chunk)
    assert b''.join(data) == pattern(4 * MIB)


def test_closed_with_blocks_under_way(held_disk):
    file = greenaio.open(held_disk.file, 'rb', buffering=0, direct=True, prefetch=8)
    file.read(4096)
    held_disk.hold()
    reader = gevent.spawn(file.readall)
    gevent.sleep(0.05)
    file.close()
    with pytest.raises(OSError, match='closed in another') as caught:
        reader.get(timeout=2)
    assert caught.value.errno == errno.EBADF
    held_disk.release()


def test_used_by_another_hub_meanwhile(disk_folder):
    path = make(disk_folder, 2 * MIB)
    with greenaio.open(path, 'rb', buffering=0, direct=True, prefetch=4) as file:
        parts = [file.read(100_000)]

        def work():
            gevent.get_hub()
            parts.append(file.read(100_000))
            gevent.get_hub().destroy(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        parts.append(file.read())
    assert b''.join(parts) == pattern(2 * MIB)


def test_forked_meanwhile_both_read_on(disk_folder):
    run_python('''
        import gevent, greenaio, os, sys
        path = sys.argv[1]
        data = open(path, 'rb').read()
        with greenaio.open(path, 'rb', buffering=0, direct=True, prefetch=8) as file:
            first = file.read(100_000)
            pid = gevent.os.fork_gevent()
            if pid == 0:
                file.seek(100_000)      # the position is shared
                os._exit(0 if file.read(500_000) == data[100_000:600_000] else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            file.seek(100_000)
            assert first + file.read() == data
    ''', make(disk_folder, 2 * MIB))


# Writing behind ----------------------------------------------------------------------------------

@pytest.mark.parametrize('step', [1, 4096, 100_003, 1 << 20])
def test_writes_in_order_are_all_there(folder, step):
    path = os.path.join(folder, 'written')
    nbytes = 3000 if step == 1 else 3 * MIB + 5
    data = pattern(nbytes + 8)[:nbytes]
    with greenaio.open(path, 'wb', buffering=0, direct=True) as file:
        for begin in range(0, nbytes, step):
            assert file.write(data[begin:begin + step]) == len(data[begin:begin + step])
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == min(begin + step, nbytes)
            assert len(file._behind._blocks) <= streams.DEPTH
        file.flush()
        assert os.path.getsize(path) == nbytes
    assert pathlib.Path(path).read_bytes() == data


@pytest.mark.parametrize('seed', range(6))
def test_read_written_and_sought_at_random_it_is_a_file(folder, seed):
    """Reads and writes that go ahead and behind, against bytes."""
    choose = random.Random(seed)
    path = make(folder, 600_000)
    model, position = bytearray(pattern(600_008)[:600_000]), 0
    with greenaio.open(path, 'r+b', buffering=choose.choice([0, 4096, 65536]), direct=True) as file:
        for i in range(300):
            what = choose.choice(['read', 'read', 'read', 'write', 'write', 'seek', 'truncate', 'flush',
                                  'end'])
            n = choose.choice([1, 100, 512, 4096, 30_000, 150_000])
            if what == 'read':
                data = file.read(n)
                assert data == model[position:position + n], (i, position, n)
                position += len(data)
            elif what == 'write':
                data = choose.randbytes(n)
                if position > len(model):
                    model += bytes(position - len(model))
                model[position:position + n] = data
                assert file.write(data) == n
                position += n
            elif what == 'seek':
                position = file.seek(choose.randrange(700_000))
            elif what == 'end':
                position = file.seek(0, os.SEEK_END)
                assert position == len(model)
            elif what == 'truncate' and i % 5 == 0:
                size = choose.randrange(800_000)
                file.truncate(size)
                model = model[:size] + bytes(max(0, size - len(model)))
            elif what == 'flush':
                file.flush()
                if i % 10 == 0:
                    assert pathlib.Path(path).read_bytes() == model
            if i % 20 == 0:
                gevent.sleep(0)
    assert pathlib.Path(path).read_bytes() == model


@pytest.mark.parametrize('by', ['flush', 'close'])
def test_full_disk_is_told_at_the_latest_by(small_disk, by):
    file = greenaio.open(os.path.join(small_disk, 'big'), 'wb', buffering=0, direct=True)
    failures = []
    for _ in range(6):
        try:
            file.write(bytes(MIB))
        except OSError as error:
            failures.append(error)
    for call in (by, 'close'):
        try:
            getattr(file, call)()
        except OSError as error:
            failures.append(error)
    assert file.closed
    file.close()                        # once is enough
    assert len(failures) >= (2 if by == 'flush' else 1)
    assert {error.errno for error in failures} == {errno.ENOSPC}


@pytest.mark.parametrize('buffering', [0, -1])
@pytest.mark.parametrize('mode', ['wb', 'ab', 'r+b'])
def test_bytes_that_did_not_fit_are_written_when_there_is_room(small_disk, mode, buffering):
    path = make(small_disk, 0)
    ballast = fill(small_disk)
    data = pattern(700_008)[:700_000]
    file = greenaio.open(path, mode, buffering=buffering, direct=True)
    for begin in range(0, len(data), 10_000):
        assert file.write(data[begin:begin + 10_000]) == 10_000     # all of it has room in memory
    for call in (file.flush, file.flush, lambda: file.truncate(10), lambda: file.seek(0, os.SEEK_END)):
        with pytest.raises(OSError, match='No space'):
            call()
    os.unlink(ballast)
    file.flush()
    assert file.write(b'END') == 3
    file.close()
    assert pathlib.Path(path).read_bytes() == data + b'END'


def test_writer_to_a_full_disk_is_told_by_each_write_and_memory_stays_bounded(small_disk):
    path = make(small_disk, 0)
    ballast = fill(small_disk)
    file = greenaio.open(path, 'wb', buffering=0, direct=True)
    taken = refused = 0
    while refused < 3:
        try:
            taken += file.write(b'x' * 100_000)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
        assert len(file._behind._blocks) <= streams.DEPTH + 1
        assert file.tell() == taken
    assert 0 < taken <= 2 * MIB
    os.unlink(ballast)
    file.close()
    assert os.path.getsize(path) == taken
    assert pathlib.Path(path).read_bytes().count(0) == 0


class Scripted:
    """A `File` whose writes answer as *answers* say: for an offset a list of results, the last one for ever.
    ``written`` is what is on its disk, ``log`` the offsets in the order in which they were asked for."""

    def __init__(self, answers):
        self.answers, self.written, self.log = answers, {}, []
        self.name, self._fd = 'scripted', os.open(os.devnull, os.O_RDWR)

    def fileno(self):
        return self._fd

    def _answer(self, data, offset):
        self.log.append(offset)
        answers = self.answers.get(offset, [len(data)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer > 0:
            self.written[offset] = bytes(data[:answer])
        return answer

    def begin(self, reading, data, offset, more=False):
        class Done:
            refused = False
            result = self._answer(data, offset)

        return None, Done, 0

    def end(self, begun):
        return begun[1].result

    def pwrite(self, data, offset):
        result = self._answer(data, offset)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        os.close(self._fd)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_no_block_is_sent_after_one_that_failed(code):
    block = streams.BLOCK_MIN
    with Scripted({block: [-code]}) as file:
        behind = streams.WriteBehind(file)
        for i in range(3):              # the last is taken, but not sent
            assert behind.write(bytes(block), i * block) == block
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                behind.write(bytes(block), behind.end)
            assert caught.value.errno == code
            with pytest.raises(OSError) as caught:
                behind.drain()
            assert caught.value.errno == code
        assert max(file.log) == block
        file.answers.clear()
        assert behind.write(b'tail', behind.end) == 4
        behind.drain()
        assert behind.is_idle
        assert sorted(file.written) == [0, block, 2 * block, 3 * block]


def test_short_block_is_finished_before_others_are_sent():
    block = streams.BLOCK_MIN
    with Scripted({0: [4096], 4096: [-errno.ENOSPC, -errno.ENOSPC, block - 4096]}) as file:
        behind = streams.WriteBehind(file)
        behind.write(bytes(block), 0)
        behind.write(bytes(block), block)
        for _ in range(2):
            with pytest.raises(OSError, match='No space'):
                behind.drain()
        behind.drain()
        assert file.log.index(block) == len(file.log) - 1
        assert {offset: len(data) for offset, data in file.written.items()} == {
            0: 4096, 4096: block - 4096, block: block}


def test_write_that_is_taken_in_part_says_how_much_and_the_next_one_raises():
    block = streams.BLOCK_MAX
    with Scripted({0: [-errno.ENOSPC]}) as file:
        behind = streams.WriteBehind(file)
        taken = behind.write(bytes(3 * block), 0)
        assert block <= taken < 3 * block
        assert behind.end == taken
        with pytest.raises(OSError, match='No space'):
            behind.write(bytes(10), taken)
        file.answers.clear()
        assert behind.write(bytes(3 * block - taken), taken) == 3 * block - taken
        behind.drain()
        assert sorted(file.written) == [0, block, 2 * block]


def test_failed_block_is_kept_by_a_caller_that_can_not_park(small_disk):
    path = make(small_disk, 0)
    ballast = fill(small_disk)
    file = greenaio.open(path, 'wb', buffering=0, direct=True)
    file.write(pattern(400_000))
    told = []

    def flush():
        try:
            file.flush()
        except OSError as error:
            told.append(error.errno)

    gevent.get_hub().loop.run_callback(flush)
    gevent.sleep(0.01)
    assert told == [errno.ENOSPC]
    os.unlink(ballast)
    file.close()
    assert pathlib.Path(path).read_bytes() == pattern(400_000)


def test_forked_child_does_not_write_the_blocks_that_its_parent_keeps(small_disk):
    run_python('''
        import gevent, greenaio, os, sys
        path, ballast = sys.argv[1:]
        file = greenaio.open(path, 'wb', buffering=0, direct=True)
        file.write(b'x' * 200_000)
        try:
            file.flush()
        except OSError:
            pid = gevent.os.fork_gevent()
        if pid == 0:
            file.flush()
            file.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert os.path.getsize(path) < 200_000
        os.unlink(ballast)
        file.close()
        assert open(path, 'rb').read() == b'x' * 200_000
    ''', make(small_disk, 0), fill(small_disk))


def test_flush_that_is_killed_leaves_no_write_that_lands_after_a_later_one(held_disk):
    """
        flush                  the disk               later
        waits for the block
        killed                 still has it
                                                      flushes: waits for the same request
                               writes it
                                                      writes there again: the newer bytes stay
    """
    with greenaio.open(held_disk.file, 'r+b', buffering=0, direct=True) as file:
        file.write(b'0' * 131_072)
        file.flush()
        engine = _hub.get_driver().engine
        before = engine.submitted, engine.by_thread
        held_disk.hold()
        file.seek(0)
        file.write(b'1' * 131_072)
        file.write(b'1' * 131_072)
        for _ in range(3):
            killed = gevent.spawn(file.flush)
            gevent.sleep(0.02)
            killed.kill()
        held_disk.release()
        file.flush()
        assert engine.submitted + engine.by_thread == sum(before) + 2
        file.seek(0)
        file.write(b'2' * 131_072)
    assert pathlib.Path(held_disk.file).read_bytes()[:262_144] == b'2' * 131_072 + b'1' * 131_072


def test_killed_while_it_waits_for_the_disk_nothing_that_was_taken_is_lost(held_disk):
    with greenaio.open(held_disk.file, 'r+b', buffering=0, direct=True) as file:
        held_disk.hold()
        taken = 0

        def write():
            nonlocal taken
            while True:
                file.write(bytes([taken % 251]) * 65536)
                taken += 1

        for _ in range(3):
            writer = gevent.spawn(write)
            gevent.sleep(0.05)
            writer.kill()
        held_disk.release()
        file.flush()
    assert taken >= streams.DEPTH
    data = pathlib.Path(held_disk.file).read_bytes()
    for i in range(taken):
        assert data[i * 65536:(i + 1) * 65536] == bytes([i % 251]) * 65536


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_forgotten_in_the_hub_what_was_taken_is_written(disk_folder):
    path = os.path.join(disk_folder, 'forgotten')
    files = [greenaio.open(path, 'wb', direct=True)]
    files[0].write(pattern(MIB)[:700_001])
    gevent.get_hub().loop.run_callback(files.clear)
    gevent.sleep(0.01)
    gc.collect()
    assert pathlib.Path(path).read_bytes() == pattern(MIB)[:700_001]


@pytest.mark.parametrize('dsync', [False, True])
def test_append_goes_to_the_end_whatever_it_is(folder, dsync):
    path = make(folder, 100)
    with greenaio.open(path, 'a+b', buffering=0, direct=True, dsync=dsync) as file:
        file.write(b'one')
        file.seek(0)
        file.write(b'two')
        assert file.tell() == 106
        file.flush()
        with open(path, 'ab') as other:
            other.write(b'three')
        file.write(b'four')
        file.seek(98)
        assert file.read(100) == pattern(104)[98:100] + b'onetwothreefour'
    assert pathlib.Path(path).read_bytes() == pattern(104)[:100] + b'onetwothreefour'


def test_dsync_is_not_written_behind(folder):
    path = make(folder, 100)
    with greenaio.open(path, 'r+b', direct=True, dsync=True) as file:
        assert file.raw._behind is None
        file.write(b'begin')
    assert pathlib.Path(path).read_bytes() == b'begin' + pattern(104)[5:100]


# Copying -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('code', ['EACCES', 'EBADF', 'EIO', 'ENOENT', 'ENOTTY', 'EOVERFLOW', 'ETXTBSY'])
def test_copy_that_the_kernel_refuses_is_read_and_written(folder, code):
    """As a sandbox or a file system may refuse copy_file_range: shutil goes on with reads and writes then."""
    source = make(folder, 5 * MIB)
    run_python(SECCOMP + f'''
import greenaio
deny({COPY_FILE_RANGE}, errno.{code})         # threads begin with it
told = []
assert greenaio.copyfile(sys.argv[1], sys.argv[2], progress=lambda done, _: told.append(done))
assert told[-1] == 5 << 20
''', source, source + '2')
    assert pathlib.Path(source + '2').read_bytes() == pathlib.Path(source).read_bytes()


def test_copy_that_can_be_neither_copied_nor_read_says_what_the_read_says(folder):
    source = make(folder, MIB)
    run_python(SECCOMP + f'''
deny({COPY_FILE_RANGE}, errno.EIO)
deny({PREADV2}, errno.EIO)
deny({PREAD64}, errno.ELOOP)
import greenaio
try:
    greenaio.copyfile(sys.argv[1], sys.argv[2])
except OSError as error:
    assert error.errno in (errno.ELOOP, errno.EIO) and error.filename == sys.argv[1], error
else:
    raise AssertionError
''', source, source + '2')


@pytest.mark.parametrize('nbytes', [0, 1, 4096, 4 * MIB, 9 * MIB + 11])
def test_copy_is_the_same(folder, nbytes):
    source, target = make(folder, nbytes), os.path.join(folder, 'copy')
    pathlib.Path(target).write_bytes(b'what was there before' * 1000)
    told = []
    assert greenaio.copyfile(source, target, progress=lambda *both: told.append(both)) == target
    assert pathlib.Path(target).read_bytes() == pathlib.Path(source).read_bytes()
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert not nbytes or told[-1] == (nbytes, nbytes)


def test_copy_from_one_file_system_to_another(disk_folder):
    source = make(disk_folder, 5 * MIB + 1)
    with tempfile.TemporaryDirectory(dir='/dev/shm') as folder:
        for one, other in ((source, os.path.join(folder, 'a')), (os.path.join(folder, 'a'), source + '2')):
            greenaio.copyfile(pathlib.Path(one), pathlib.Path(other))
        assert pathlib.Path(source + '2').read_bytes() == pathlib.Path(source).read_bytes()


def test_copy_of_a_file_without_a_length(folder):
    target = os.path.join(folder, 'cpuinfo')
    greenaio.copyfile('/proc/cpuinfo', target)
    assert pathlib.Path(target).read_text().startswith('processor')


def test_copy_refuses_what_shutil_refuses(folder):
    source = make(folder, 10)
    os.mkfifo(source + '-fifo')
    os.symlink(source, source + '-link')
    for arguments in ((source, source), (source, source + '-link'), ('/no/such', source + '2'),
                      (folder, source + '2'), (source, folder), (source + '-fifo', source + '2')):
        with pytest.raises(Exception) as wanted:
            shutil.copyfile(*arguments)
        with pytest.raises(wanted.type):
            greenaio.copyfile(*arguments)
    assert pathlib.Path(source).read_bytes() == pattern(16)[:10]
    assert greenaio.copyfile(source + '-link', source + '3', follow_symlinks=False) == source + '3'
    assert os.readlink(source + '3') == source


def test_copy_of_a_folder_leaves_the_target_alone(folder):
    target = make(folder, 10)
    with pytest.raises(IsADirectoryError) as caught:
        greenaio.copyfile(folder, target)
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, folder)
    assert os.path.getsize(target) == 10
    with pytest.raises(IsADirectoryError):
        greenaio.copyfile(folder, target + '2')
    assert not os.path.exists(target + '2')


@pytest.mark.parametrize('name', ['missing/', 'there/', 'folder/'])
def test_copy_to_a_name_with_a_slash_at_its_end_says_what_is_not_there(folder, name):
    source, target = make(folder, 10), os.path.join(folder, name)
    make(folder, 10, 'there')
    os.mkdir(os.path.join(folder, 'folder'))
    with pytest.raises(OSError) as wanted:
        shutil.copyfile(source, target)
    with pytest.raises(OSError) as caught:
        greenaio.copyfile(source, target)
    assert (type(caught.value), str(caught.value)) == (type(wanted.value), str(wanted.value))


def test_copy_of_a_link_refuses_what_shutil_refuses(folder):
    source = make(folder, 10)
    os.mkfifo(source + '-fifo')
    for name in (source, source + '-fifo'):
        os.symlink(name, name + '-link')
    for src, dst in (('-link', ''), ('-link', '-link'), ('-fifo-link', '-new'), ('-link', '-fifo')):
        with pytest.raises(Exception) as wanted:
            shutil.copyfile(source + src, source + dst, follow_symlinks=False)
        with pytest.raises(wanted.type):
            greenaio.copyfile(source + src, source + dst, follow_symlinks=False)
    assert not os.path.lexists(source + '-new')


def test_copy_to_a_full_disk(small_disk, disk_folder):
    source = make(disk_folder, 6 * MIB)
    target = os.path.join(small_disk, 'copy')
    with pytest.raises(OSError, match='No space') as caught:
        greenaio.copyfile(source, target)
    assert caught.value.errno == errno.ENOSPC
    assert target in (caught.value.filename, caught.value.filename2)


def test_copy_replaces_what_is_there_whole(folder):
    source, target = make(folder, 3 * 4096), make(folder, 2 * MIB, 'other')
    os.symlink(os.path.join(folder, 'new'), source + '-to-new')
    for place in (target, source + '-to-new'):
        greenaio.copyfile(source, place)
        assert pathlib.Path(place).read_bytes() == pathlib.Path(source).read_bytes()


@pytest.mark.parametrize('waits_in', ['open', 'stat', 'copy'])
@pytest.mark.parametrize('exception', [
    FileExistsError(errno.EEXIST, 'mine'), FileNotFoundError(errno.ENOENT, 'mine'),
    OSError(errno.EXDEV, 'mine')])
def test_copy_that_is_timed_out_does_not_take_that_for_an_answer(folder, monkeypatch, waits_in, exception):
    """So a file that is there is not emptied because a Timeout said that it exists."""
    source, target = make(folder, 5000), make(folder, 10, 'target')
    one, other = os.pipe()

    def waiting(function):
        def wait(*args, **kwargs):
            _loop.wait_for(one, 1)
            return function(*args, **kwargs)
        return wait

    if waits_in == 'open':
        def new(name, flags=0, **options):
            return (waiting(greenaio.File) if flags & os.O_EXCL else greenaio.File)(name, flags, **options)

        monkeypatch.setattr(copies, 'File', new)
    else:
        name = {'stat': 'stat', 'copy': 'copy_file_range'}[waits_in]
        monkeypatch.setattr(copies._calls, name, waiting(getattr(copies._calls, name)))
    try:
        with pytest.raises(type(exception)) as caught, gevent.Timeout(0.05, exception):
            greenaio.copyfile(source, target)
        assert caught.value is exception
        assert (exception.filename, exception.filename2) == (None, None)
        assert waits_in == 'copy' or pathlib.Path(target).read_bytes() == pattern(16)[:10]
    finally:
        os.close(one)
        os.close(other)


def test_killed_copy_leaves_nothing_open(disk_folder):
    source = make(disk_folder, 32 * MIB)
    before = len(os.listdir('/proc/self/fd'))
    reached = gevent.event.Event()
    copy = gevent.spawn(greenaio.copyfile, source, source + '2', progress=lambda done, _: reached.set())
    assert reached.wait(10)
    copy.kill()
    for _ in range(100):
        if len(os.listdir('/proc/self/fd')) <= before:
            break
        gevent.sleep(0.01)
    assert len(os.listdir('/proc/self/fd')) <= before
    assert not copy.successful() or isinstance(copy.value, gevent.GreenletExit)


# Found by reading --------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['wb', 'ab', 'xb'])
def test_only_written_it_still_finishes_sectors_that_it_began(folder, mode):
    path = os.path.join(folder, 'odd')
    with greenaio.open(path, mode, direct=True) as file:
        for _ in range(3):
            file.write(b'x' * 100)
            file.flush()
        assert not file.readable()
    assert pathlib.Path(path).read_bytes() == b'x' * 300


def test_written_twice_the_later_counts(disk_folder):
    path = make(disk_folder, 300_000)
    with greenaio.open(path, 'r+b', buffering=0, direct=True) as file:
        file.write(b'a' * 100)
        file.seek(0)
        file.write(b'b' * 131_072)
    assert pathlib.Path(path).read_bytes()[:131_072] == b'b' * 131_072


@pytest.mark.parametrize('options', [{'direct': True}, {'direct': True, 'dsync': True}, {'prefetch': 4}])
def test_own_writes_are_seen_by_own_reads(disk_folder, options):
    path = make(disk_folder, 2 * MIB)
    with greenaio.open(path, 'r+b', buffering=0, **options) as file:
        for _ in range(4):
            file.read(131_072)
        at = file.tell()
        file.seek(at + 4096)
        file.write(b'N' * 4096)
        file.seek(at)
        assert file.read(12_288)[4096:8192] == b'N' * 4096


def test_forked_with_something_to_write_behind_the_parent_writes_it(disk_folder):
    run_python('''
        import gevent, greenaio, os, sys
        path = sys.argv[1]
        file = greenaio.open(path, 'wb', buffering=0, direct=True)
        file.write(b'x' * 200_000)
        pid = gevent.os.fork_gevent()
        if pid == 0:
            file.close()
            os._exit(0)
        file.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert open(path, 'rb').read() == b'x' * 200_000
    ''', os.path.join(disk_folder, 'forked'))


@pytest.mark.parametrize('exception', [
    TimeoutError, TimeoutError('mine'), OSError(errno.ENOSPC, 'mine'), BlockingIOError(errno.EAGAIN, 'mine')])
def test_timeout_of_another_kind_is_not_taken_for_the_disks_error(held_disk, exception):
    with greenaio.open(held_disk.file, 'r+b', buffering=0, direct=True) as file:
        held_disk.hold()
        file.write(b'2' * 131_072 + b'tail')
        with pytest.raises(getattr(exception, '__class__', exception) if not isinstance(exception, type)
                           else exception), gevent.Timeout(0.1, exception):
            file.flush()
        with pytest.raises(OSError), gevent.Timeout(0.1, exception):  # noqa: PT011
            file.close()
        with gevent.Timeout(0.2, False):
            file.close()
        assert not file.closed          # and nothing lost
        held_disk.release()
    assert pathlib.Path(held_disk.file).read_bytes()[:131_076] == b'2' * 131_072 + b'tail'


@pytest.mark.parametrize('options', [{}, {'prefetch': 0}, {'dsync': True}], ids=str)
@pytest.mark.parametrize('flushes', [False, True])
def test_two_that_append_past_the_cache_lose_nothing(folder, options, flushes):
    path = os.path.join(folder, 'log')

    def append(letter):
        with greenaio.open(path, 'ab', direct=True, buffering=0, **options) as log:
            for i in range(10):
                log.write(letter * 700)
                if flushes and i % 3 == 0:
                    log.flush()
                if i % 2:
                    gevent.sleep(0)

    gevent.joinall([gevent.spawn(append, letter) for letter in (b'A', b'B', b'C')], raise_error=True)
    with open(path, 'rb') as log:
        got = log.read()
    assert len(got) == 3 * 7000
    assert sorted(got[at:at + 700] for at in range(0, len(got), 700)) == [
        letter * 700 for letter in (b'A', b'B', b'C') for _ in range(10)]


@pytest.mark.parametrize('options', [{}, {'prefetch': 0}, {'dsync': True}], ids=str)
def test_append_after_a_killed_one_leaves_no_hole(folder, options):
    path = os.path.join(folder, 'log')
    for i in range(10):
        with greenaio.open(path, 'wb'), greenaio.open(path, 'ab', direct=True, buffering=0, **options) as log:
            killed = gevent.spawn(log.write, b'K' * 700)
            gevent.sleep(0 if i % 2 else i * 1e-5)
            killed.kill()
            for _ in range(3):
                log.write(b'L' * 700)
        with open(path, 'rb') as log:
            got = log.read()
        assert got.replace(b'K' * 700, b'', 1) == b'L' * 2100
