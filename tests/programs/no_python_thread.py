"""Use files in all ways. No Python thread can be started: print how many were asked for."""

import _thread
import threading

asked: list[object] = []


def refuse(work, *args, **kwargs):
    asked.append(work)
    raise RuntimeError("can't start new thread")


threading._start_new_thread = _thread.start_new_thread = refuse         # type: ignore[attr-defined]
_thread.start_joinable_thread = threading._start_joinable_thread = refuse       # type: ignore[attr-defined]

import contextlib
import gc
import os
import socket
import sys

import gevent

import greenaio
import greenaio.os
from greenaio._files import zones as _zones
from greenaio.block import BlockDevice
from greenaio.fileobject import FileObject

KIB = 1024
folder = sys.argv[1]
path = os.path.join(folder, 'data')


def by_number():
    fd = greenaio.os.open(path, os.O_RDWR | os.O_CREAT)
    assert greenaio.os.write(fd, bytes(64 * KIB)) == greenaio.os.pwrite(fd, b'x' * 64 * KIB, 0) == 64 * KIB
    assert greenaio.os.writev(fd, [b'y', b'y']) == greenaio.os.pwritev(fd, [b'z', b'z'], 10) == 2
    greenaio.os.fsync(fd)
    greenaio.os.fdatasync(fd)
    os.lseek(fd, 0, os.SEEK_SET)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert greenaio.os.read(fd, 10) == greenaio.os.pread(fd, 10, 50) == b'x' * 10
    buffers = [bytearray(4), bytearray(6)]
    assert greenaio.os.readv(fd, buffers) == greenaio.os.preadv(fd, buffers, 20 * KIB) == 10
    greenaio.os.ftruncate(fd, 32 * KIB)
    greenaio.os.posix_fallocate(fd, 0, 40 * KIB)
    assert greenaio.os.fstat(fd).st_size == greenaio.os.stat(path).st_size == 40 * KIB
    with contextlib.suppress(OSError):          # not every file system has that
        greenaio.os.copy_file_range(fd, fd, KIB, 0, 36 * KIB)
    ours, theirs = socket.socketpair()
    assert greenaio.os.sendfile(ours.fileno(), fd, 0, KIB) == len(theirs.recv(KIB))
    ours.close()
    theirs.close()
    greenaio.os.close(fd)


def by_file():
    with greenaio.File(path, os.O_RDWR | os.O_DIRECT) as file:
        memory = greenaio.aligned_buffer(4096)
        assert file.pwrite(memory, 0) == file.preadv([memory], 0) == 4096
        assert file.pwrite(b'misaligned', 4090) == 10
        assert file.pread(10, 4090) == b'misaligned'
        with contextlib.suppress(OSError):
            file.fallocate(0, 0, 64 * KIB)
        file.fdatasync()


def by_file_objects():
    for direct in (False, True):
        for mode in ('wb', 'ab', 'rb+'):
            with greenaio.open(path, mode, direct=direct) as file:
                file.write(b'line\n' * 2000)
                file.flush()
                assert file.tell()
        with greenaio.open(path, 'rb', direct=direct, prefetch=2) as file:
            assert len(file.read()) == 20_000
    with greenaio.open(path, 'a+') as text:
        text.write('…')
        text.seek(0)
        assert sum(1 for _ in text) == 4001
        text.truncate(5)
    with FileObject(path, 'rb') as file:
        assert file.readline() == b'line\n' and not file.isatty()
    greenaio.copyfile(path, path + '-copy')


def by_block_device():
    image = path + '-image'
    with BlockDevice(image, create_size=1024 * KIB, zone_size=64 * KIB) as device:
        assert device.block_status(1024 * KIB, 0)
        assert device.pwrite(b'x' * 4096, 64 * KIB) == len(device.pread(4096, 0))
        with contextlib.suppress(OSError):      # where there are no holes, all zones are full
            device.zone_append(b'y' * 4096, 0)
            device.zone_reset(0)
        device.flush()
        device.discard(4096, 64 * KIB)
        device.write_zeroes(8192, 100, fua=True)
    with BlockDevice(image, zone_size=64 * KIB) as device:
        assert device.zones()
    # What a zoned device is asked; this file is none.
    with greenaio.File(image) as file, contextlib.suppress(OSError):
        _zones._reported(file.fileno(), 0, 512)
    with contextlib.suppress(ValueError):
        BlockDevice(path + '-refused', create_size=KIB, zone_size=1000)
    assert not os.path.exists(path + '-refused')


def by_fifo():
    """A writer that appends: `io` wants to know the end, and there is none."""
    fifo = path + '-fifo'
    os.mkfifo(fifo)
    reader = gevent.spawn(greenaio.open, fifo, 'rb')
    with greenaio.open(fifo, 'ab') as writer, reader.get(timeout=10) as file:
        assert not writer.seekable()
        writer.write(b'told')
        writer.close()
        assert file.read() == b'told'


def by_closes():
    """Of files that are in use, forgotten, or without a name: to free those takes time."""
    for _ in range(2):
        fd = greenaio.os.open(path + '-nameless', os.O_RDWR | os.O_CREAT)
        os.unlink(path + '-nameless')
        work = gevent.spawn(greenaio.os.pwrite, fd, bytes(1024 * KIB), 0)
        gevent.sleep(0)
        greenaio.os.close(fd)
        assert work.get(timeout=10) == 1024 * KIB
    file = greenaio.open(path + '-nameless', 'wb', 0)
    os.unlink(path + '-nameless')
    file.write(bytes(1024 * KIB))
    sys.unraisablehook = lambda _: None
    del file
    gc.collect()


for way in (by_number, by_file, by_file_objects, by_block_device, by_fifo, by_closes):
    way()
print(len(asked), *asked)
