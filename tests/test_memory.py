"""Memory that O_DIRECT accepts: aligned, zeroed, given back and used again."""

import ctypes
import mmap

import gevent
import pytest

from greenaio import aligned_buffer
from greenaio._core import memory as _memory
from greenaio._files import portable_file as _fallback
from tests.support.disks import pattern
from tests.support.processes import run_program


def address(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize('alignment', [1, 512, 4096, 8192, 65536, 1 << 21])
@pytest.mark.parametrize('nbytes', [1, 4096, 5000, 1 << 20, (1 << 20) + 1])
def test_buffer_is_aligned_writable_and_of_its_size(nbytes, alignment):
    buffer = aligned_buffer(nbytes, alignment)
    assert address(buffer) % alignment == 0
    assert len(buffer) == nbytes and not buffer.readonly and buffer.format == 'B'
    buffer[:] = b'\xff' * nbytes
    assert bytes(buffer) == b'\xff' * nbytes


def test_recycled_memory_is_zeroed():
    for _ in range(20):
        buffer = aligned_buffer(4096)
        assert bytes(buffer) == bytes(4096)
        buffer[:] = b'\xff' * 4096


def test_no_two_buffers_overlap():
    buffers = [aligned_buffer(4096) for _ in range(3000)]
    del buffers[::2]
    buffers += [aligned_buffer(4096) for _ in range(2000)]
    places = sorted(map(address, buffers))
    assert all(b - a >= 4096 for a, b in zip(places, places[1:]))


def test_empty_buffer():
    assert bytes(aligned_buffer(0)) == b''


@pytest.mark.parametrize('args, error', [
    ((-1,), ValueError), ((10, 0), ValueError), ((10, 3), ValueError), ((10, -4096), ValueError),
    (('x',), TypeError), ((1 << 62,), MemoryError), (((1 << 63) - 1, 8192), MemoryError),
    ((1.5,), TypeError)])
def test_bad_sizes_are_refused(args, error):
    with pytest.raises(error):
        aligned_buffer(*args)


def test_buffer_outlives_its_views():
    view = aligned_buffer(8192)[4096:]
    view[:] = b'a' * 4096
    gevent.sleep(0)
    assert bytes(view) == b'a' * 4096
    assert mmap.PAGESIZE >= 4096


def test_ten_thousand_waiting_greenlets_cost_at_most_a_kibibyte_each():
    """Resident memory per greenlet that waits for a request, less that of one that just sleeps."""
    sleeping, waiting = (float(run_program('waiting_greenlets', kind).stdout) for kind in ('sleep', 'wait'))
    assert sleeping > 1000
    assert waiting - sleeping <= 1024, (waiting, sleeping)


@pytest.mark.parametrize('kind', [_memory.Filling, _fallback.Filling])
def test_bytes_that_are_filled_are_given_away_once(kind):
    for size, resized, taken in ((0, 0, 0), (1, 1, 1), (10, 10, 4), (10, 30, 25), (10, 3, 0), (0, 5, 5)):
        filling = kind(size)
        assert len(filling) == size
        filling.resize(resized)
        view = memoryview(filling)
        view[:] = pattern(32)[:resized]
        if resized:
            with pytest.raises(BufferError):
                filling.resize(resized + 1)
        del view
        data = filling.take(taken)
        assert type(data) is bytes and data == pattern(32)[:taken]


def test_bytes_that_were_taken_are_not_written_any_more():
    filling = _memory.Filling(8)
    filling.take(8)
    for use in (len, memoryview, lambda one: one.resize(9), lambda one: one.take(1)):
        with pytest.raises(ValueError):
            use(filling)
    with pytest.raises((SystemError, ValueError, MemoryError)):
        _memory.Filling(-1)
