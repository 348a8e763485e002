"""Iteration over a text file yields the lines of `io`, whatever methods are called between two lines."""

import os
import weakref

import gevent
import gevent.event
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import greenaio
from greenaio.fileobject import BufferedReader, FileIO, TextIOWrapper
from tests.support.disks import temporary_folder

BLOCK = 8192                    # bytes: the first that is cut

PIECES = st.sampled_from([
    b'line\n', b'\n', b'\xc3\xa4\xe2\x82\xac\n', b'no end', b'\r\n', b'\r', b'\xff', b'\x0c\x1c\x85\n',
    b'x' * 5000 + b'\n', b'y' * 70000, b'y' * 150000, b'short\n' * 2000, b'\xc3'])
STEPS = st.sampled_from([
    'next', 'for', 'for', 'readline', 'readline 3', 'read 5', 'read', 'tell', 'back', 'begin', 'end', 'here',
    'newlines', 'lines', 'readlines'])


def play(file, steps):
    """Return what the *steps* on *file* have returned or raised."""
    found, remembered = [], 0
    for step in steps:
        try:
            if step == 'next':
                result = next(file, None)
            elif step == 'for':
                result = [line for _, line in zip(range(3), file, strict=False)]
            elif step.startswith('read') and step != 'readlines':
                method, _, size = step.partition(' ')
                result = getattr(file, method)(*([int(size)] if size else []))
            elif step == 'tell':
                result = remembered = file.tell()
            elif step == 'newlines':
                result = file.newlines
            elif step in ('lines', 'readlines'):
                result = list(file) if step == 'lines' else file.readlines()
            else:
                result = file.seek(*{'back': (remembered,), 'begin': (0,), 'end': (0, os.SEEK_END),
                                     'here': (0, os.SEEK_CUR)}[step])
        except (OSError, ValueError) as error:
            result = type(error), str(error)
        found.append((step, result))
    return found


def can_be_decoded(data, encoding, errors):
    try:
        data.decode(encoding, errors)
    except UnicodeDecodeError:
        return False
    return True


@pytest.fixture(scope='module')
def path():
    with temporary_folder('memory') as folder:
        yield os.path.join(folder, 'text')


@given(pieces=st.lists(PIECES, max_size=12), steps=st.lists(STEPS, max_size=12),
       encoding=st.sampled_from(['utf-8', 'utf-8', 'latin-1', 'ascii', 'utf-16', 'utf-8-sig']),
       errors=st.sampled_from(['strict', 'strict', 'replace']),
       newline=st.sampled_from([None, None, '\n', '', '\r\n']))
@example([b'short\n' * 2000, b'\r\n'], ['for', 'lines', 'newlines'], 'utf-8', 'strict', None)
@settings(max_examples=500, deadline=None)
def test_each_sequence_of_calls_is_as_in_io(path, pieces, steps, encoding, errors, newline):
    data = b''.join(pieces)
    # `io` raises an error of a block before the first line of the block, and its blocks are smaller.
    assume(len(data) <= BLOCK or can_be_decoded(data, encoding, errors))
    with open(path, 'wb') as file:
        file.write(data)
    options = {'encoding': encoding, 'errors': errors, 'newline': newline}
    with open(path, **options) as file:
        wanted = play(file, steps)
    with greenaio.open(path, **options) as file:
        assert play(file, steps) == wanted


@pytest.fixture
def text(folder):
    """A file of 20,000 lines with their numbers, and its path."""
    path = os.path.join(folder, 'text')
    with open(path, 'w') as file:
        file.writelines(f'{i}\n' for i in range(20000))
    with greenaio.open(path) as file:
        yield file, path


def test_greenlets_that_share_an_iterator_or_a_file_get_each_line_once(text):
    file, _ = text
    found, lines = [], iter(file)

    def take(source):
        for line in source:
            found.append(line)
            gevent.sleep(0)

    gevent.joinall([gevent.spawn(take, source) for source in (file, file, lines, lines)], raise_error=True)
    assert sorted(map(int, found)) == list(range(20000))


def test_killed_while_it_reads_a_block_it_loses_no_line(text, monkeypatch):
    file, _ = text
    assert [next(file) for _ in range(3)] == ['0\n', '1\n', '2\n']
    readinto, has_begun = FileIO.readinto, gevent.event.Event()

    def wait(self, buffer):
        has_begun.set()
        gevent.sleep(10)

    monkeypatch.setattr(FileIO, 'readinto', wait)
    reader = gevent.spawn(list, file)
    has_begun.wait(5)
    reader.kill()
    monkeypatch.setattr(FileIO, 'readinto', readinto)
    first = int(next(file))
    assert [int(line) for line in file] == list(range(first + 1, 20000))
    assert BLOCK / 6 < first < BLOCK            # behind the lines that the killed greenlet had in its list


def test_file_that_is_closed_yields_no_line(text):
    file, _ = text
    lines = iter(file)
    next(lines)
    file.close()
    for call in (lambda: next(lines), lambda: next(file), lambda: iter(file)):
        with pytest.raises(ValueError, match='closed file'):
            call()


def test_flush_tells_the_position_of_the_next_line_again(text):
    file, _ = text
    for _ in zip(range(5), file, strict=False):
        pass
    with pytest.raises(OSError, match='telling position disabled'):
        file.tell()
    file.flush()
    assert file.tell() == 10 and file.buffer.tell() == 10 and file.readline() == '5\n'


def test_lines_that_are_appended_later_follow(text):
    file, path = text
    assert len(list(file)) == 20000
    with open(path, 'a') as more:
        more.write('more\nand')
    assert list(file) == ['more\n', 'and']
    with open(path, 'a') as more:
        more.write(' more\n')
    assert list(file) == [' more\n']


def test_class_that_overrides_a_method_has_its_lines_from_there(text):
    class Loud(TextIOWrapper):
        def readline(self, size=-1, /):
            return super().readline(size).replace('\n', '!\n')

    _, path = text
    with Loud(BufferedReader(FileIO(path))) as file:
        assert next(iter(file)) == '0!\n' and next(file) == '1!\n'


def test_iteration_makes_no_cycle_that_keeps_the_file_open(text):
    _, path = text
    file = greenaio.open(path)
    fd = file.fileno()
    lines = iter(file)
    next(lines)
    file.close()
    del file, lines
    with greenaio.open(path) as file:
        assert file.fileno() == fd
        for _ in file:
            break
        found = weakref.ref(file)
    del file
    assert found() is None


def test_written_file_and_pipe_are_left_to_io(folder):
    path = os.path.join(folder, 'both')
    with greenaio.open(path, 'w+') as file:
        file.write('a\nb\n')
        file.seek(0)
        assert iter(file) is file and list(file) == ['a\n', 'b\n']
    reader, writer = os.pipe()
    with greenaio.open(reader) as file, open(writer, 'w') as peer:
        print('line', file=peer, flush=True)
        assert iter(file) is file and next(file) == 'line\n'
