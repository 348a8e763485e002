"""A disk stands still for a second. Nobody but those who use it may notice.

Each case runs in a process of its own, under a watchdog, for a hub that hangs in the kernel can't be
interrupted from inside. Another process ticks beside it: what it loses, the machine took, and what the
scheduler and the host say that they took. A hub that waits for the frozen disk waits till it thaws.
"""

import os
import subprocess
import sys
import tempfile

import pytest

from tests.support import missing
from tests.support.disks import make_scattered, pattern
from tests.support.processes import CONTROL, run_python

FROZEN = 1.0        # seconds

FREEZE = '''
import gevent, os
import greenaio.os
from greenaio import File, aligned_buffer
from tests.programs.stall import *
'''

CASES = {
    'direct': '''
file = File(path, os.O_RDWR | os.O_DIRECT)
operations += [lambda i=i: file.pread(4096, i * 4096) for i in range(MANY)]
''',
    'overwrite': '''
file = File(path, os.O_RDWR | os.O_DIRECT)
memory = aligned_buffer(4096)
operations += [lambda i=i: file.pwrite(memory, i * 4096) for i in range(MANY)]
''',
    'extending': '''
file = File(path, os.O_RDWR | os.O_DIRECT)
memory = aligned_buffer(4096)
operations += [lambda i=i: file.pwrite(memory, size + i * 4096) for i in range(MANY)]
''',
    'buffered': '''
file = File(path, os.O_RDONLY)
os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
operations += [lambda i=i: file.pread(4096, i * 16384) for i in range(MANY)]
''',
    'buffered raw': '''
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
operations += [lambda i=i: greenaio.os.pread(fd, 4096, i * 16384) for i in range(MANY)]
''',
    'dirty': '''
fd = os.open(path, os.O_WRONLY)
os.pwrite(fd, bytes(MANY * 4096), 0)
file = File(path, os.O_RDONLY | os.O_DIRECT)
operations += [lambda i=i: file.pread(4096, i * 4096) for i in range(MANY)]
''',
    'overwritten while dirty': '''
file = File(path, os.O_RDWR | os.O_DIRECT)
memory = aligned_buffer(4096)
for i in range(100):            # xfs learns that it need not be asked
    file.pwrite(memory, i * 4096)
fd = os.open(path, os.O_WRONLY)
os.pwrite(fd, bytes(MANY * 4096), 0)
operations += [lambda i=i: file.pwrite(memory, i * 4096) for i in range(MANY)]
''',
    'fsync': '''
file = File(path, os.O_RDWR)
os.pwrite(file.fileno(), bytes(size), 0)
operations += [file.fsync if i % 2 else file.fdatasync for i in range(MANY)]
''',
    'written': '''
file = File(path, os.O_RDWR)
operations += [lambda i=i: file.pwrite(bytes(4096), i * 4096) for i in range(MANY)] + [file.fsync]
''',
    'close': '''
files = [File(path, os.O_RDWR if i % 2 else os.O_RDONLY) for i in range(60)]
for file in files[1::2]:
    os.pwrite(file.fileno(), b'x', 0)
operations += [file.close for file in files]
reader = File(path)
os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
operations.append(lambda: reader.pread(10, 7 << 20))
''',
    'paths': '''
folder = os.path.dirname(path)
def path_calls(i):
    greenaio.os.stat(path)
    with File(path) as file:
        greenaio.os.fstat(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        greenaio.os.read(file.fileno(), 10)
    if not path.endswith('disk'):
        name = os.path.join(folder, f'new{i}')
        with File(name, os.O_RDWR | os.O_CREAT) as file:
            greenaio.os.posix_fallocate(file.fileno(), 0, 65536)
            file.pwrite(bytes(4096), 0)
            file.fsync()
            greenaio.os.ftruncate(file.fileno(), 10)
operations += [lambda i=i: path_calls(i) for i in range(60)]
''',
}

BLOCK_STATUS = '''
from greenaio.block import BlockDevice
from tests.support.nbd import Client, connect
device, other = BlockDevice(path, readonly=True), BlockDevice(healthy, readonly=True)
clients = [Client(connect(device)) for _ in range(10)]
operations += [lambda one=one: one.block_status(size, 0) for one in clients]
neighbour = Client(connect(other))
neighbours.append(lambda: neighbour.block_status(4096, 0))
'''


def show_that_nobody_notices(case, path, healthy, freeze, thaw):
    with subprocess.Popen([sys.executable, CONTROL, str(2 * FROZEN + 1.5)], stdout=subprocess.PIPE,
                          text=True) as control:
        done = run_python(FREEZE + case + '\nfrozen_for_a_while()',
                          path, healthy, freeze, thaw, FROZEN, timeout=60)
        machine = float(control.stdout.read())
    gap, names, reads, before, waiting, away = map(float, done.stdout.split())
    machine += away
    assert gap < 0.05 + machine, f'the hub stood still for {gap:.3f} s, the machine for {machine:.3f} s'
    assert names < 0.05 + machine
    assert reads < 1.5 * before + machine, 'the other disk noticed'
    assert waiting > 0, 'nothing waited for the disk: this showed nothing'


def make_file(folder, nbytes):
    path = os.path.join(folder, 'data')
    with open(path, 'wb') as file:
        file.write(pattern(nbytes))
        os.fsync(file.fileno())
    return path


@pytest.mark.parametrize('case', CASES)
def test_frozen_disk_stops_nobody_else(freezable, disk_folder, case):
    path = freezable.path
    if case == 'extending' and not os.path.isdir(path):
        pytest.skip('the disk itself gets no longer')
    if os.path.isdir(path):
        path = make_file(path, 8 << 20)
    show_that_nobody_notices(CASES[case], path, make_file(disk_folder, 4096), *freezable.commands())


@pytest.mark.parametrize('freezable', ['ext4', 'xfs'], indirect=True)
def test_clients_that_ask_for_blocks_of_a_frozen_image_hold_up_no_other_disk(freezable, disk_folder):
    """The file system has to read where they are: there are many, and it remembers none."""
    path = os.path.join(freezable.path, 'image')
    make_scattered(path)
    freezable.remount()
    show_that_nobody_notices(BLOCK_STATUS, path, make_file(disk_folder, 4096), *freezable.commands())


@pytest.mark.parametrize('case', ['direct', 'overwrite', 'buffered', 'buffered raw'])
def test_throttled_disk_stops_nobody_else(held_disk, case):
    """One request per second is what it does, as a volume that has used up its credit."""
    if not os.path.isdir('/dev/shm'):
        missing('no /dev/shm')
    with tempfile.TemporaryDirectory(dir='/dev/shm') as elsewhere:
        with open(held_disk.file, 'ab') as file:
            file.write(pattern(4 << 20))        # to 8 MiB, as the cases want it
            os.fsync(file.fileno())
        show_that_nobody_notices(CASES[case], held_disk.file, make_file(elsewhere, 4096),
                                 *held_disk.commands())


def test_without_greenaio_dns_waits_for_the_disk(freezable):
    """What all this is for: gevent's file objects and its resolver share one pool of threads."""
    if os.path.isdir(freezable.path):
        pytest.skip('shown once is enough')
    done = run_python('''
        import gevent, os, signal, subprocess, sys, time
        from gevent.fileobject import FileObjectThread
        path, freeze, thaw = sys.argv[1:]
        files = [FileObjectThread(os.open(path, os.O_RDONLY), 'rb', buffering=0) for _ in range(20)]
        os.posix_fadvise(files[0].fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        subprocess.run(freeze, shell=True, check=True)
        thaw = subprocess.Popen(['sh', '-c', f'sleep 1; {thaw}'])
        jobs = [gevent.spawn(file.read, 10) for file in files]
        gevent.sleep(0.05)
        began = time.monotonic()
        gevent.get_hub().resolver.getaddrinfo('localhost', 80)
        print(time.monotonic() - began)
        thaw.wait()
        gevent.joinall(jobs)
        for file in files:
            file.close()
    ''', freezable.path, *freezable.commands())
    assert float(done.stdout) > 0.5
