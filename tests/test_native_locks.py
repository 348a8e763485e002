"""Locks that are not gevent's: which ones `greenaio.monkey` replaces."""

import importlib.util
import struct

import pytest

from tests.support import missing
from tests.support.processes import make_plugin_visible, run_program, run_python

# Each native lock that is left, and why it stops nobody.


def test_no_native_lock_is_left_that_a_greenlet_could_wait_for(tmp_path):
    """Where a new version of Python or gevent brings another one, this says which."""
    run_program('native_locks', env=make_plugin_visible(tmp_path))


def missing_module(name):
    if importlib.util.find_spec(name) is None:
        missing(f'{name} is not installed')


# Modules that are imported, and so make their locks, before gevent patches.
EARLY = '''
import _pyio, io, os, sys, tempfile
import multiprocessing.heap, multiprocessing.resource_tracker, multiprocessing.shared_memory
import gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey
greenaio.monkey.patch_all()
import gevent
def at_once(work, n=3):
    gevent.get_hub()
    jobs = [gevent.spawn(work, i) for i in range(n)]
    gevent.joinall(jobs, timeout=20, raise_error=True)
    assert all(job.ready() for job in jobs)
    return [job.value for job in jobs]
'''


def test_greenlets_make_the_first_temporary_files_at_once(folder):
    run_python(EARLY + 'at_once(lambda _: tempfile.NamedTemporaryFile().write(b"x" * 100000))',
               env={'TMPDIR': folder})


@pytest.mark.parametrize('work', [
    'multiprocessing.heap.BufferWrapper(100000)',
    'multiprocessing.resource_tracker.ensure_running()',
    'multiprocessing.shared_memory.SharedMemory(create=True, size=100).unlink()',
])
def test_first_use_of_multiprocessing_by_greenlets_at_once(disk_folder, work):
    run_python(EARLY + f'at_once(lambda _: {work})', env={'TMPDIR': disk_folder})


def test_greenlets_share_a_buffer_of_pyio(disk_folder):
    run_python(EARLY + '''
path = os.path.join(sys.argv[1], 'file')
with open(path, 'wb') as file:
    file.write(bytes(200000))
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
with open(path, 'rb', buffering=0) as raw:
    reader = _pyio.BufferedReader(raw, 4096)
    assert sum(map(len, at_once(lambda _: reader.read(50000)))) == 150000
''', disk_folder)


def test_greenlets_import_a_module_that_reads_a_file(disk_folder, tmp_path):
    (tmp_path / 'reads.py').write_text('''
import os
with open(os.environ['DATA'], 'rb') as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = len(file.read())
with open(os.environ['DATA'] + '-2', 'wb') as file:
    file.write(b'x')
''')
    with open(f'{disk_folder}/data', 'wb') as file:
        file.write(bytes(1 << 20))
    run_python(EARLY + '''
def work(_):
    import reads
    return reads.size
assert at_once(work) == [1 << 20] * 3
''', env={'DATA': f'{disk_folder}/data', 'PYTHONPATH': str(tmp_path)})


def test_greenlet_imports_from_a_package_whose_init_patches_and_uses_files(disk_folder, tmp_path):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package/part.py').write_text('number = 5')
    (tmp_path / 'package/__init__.py').write_text('''
import os
import gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey
greenaio.monkey.patch_all()
import gevent
begun = []
def work():
    begun.append(True)
    import package.part
    return package.part.number
job = gevent.spawn(work)
with open(os.environ['DATA'], 'wb') as file:
    while not begun:
        file.write(b'x')
        os.fsync(file.fileno())
    for _ in range(3):
        os.fsync(file.fileno())
assert not job.ready()
''')
    run_python('import package; assert package.job.get(timeout=10) == 5',
               env={'DATA': f'{disk_folder}/data', 'PYTHONPATH': str(tmp_path)}, timeout=20)


def test_first_counts_of_greenlets_after_a_gunicorn_conf_imported_prometheus_client(disk_folder):
    """As its documentation says. A metric makes its file while it has a lock that all metrics share."""
    missing_module('prometheus_client')
    run_python('''
import prometheus_client.multiprocess
''' + EARLY + '''
kinds = prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Summary
def work(i):
    metric = kinds[i](f'metric{i}', 'text')
    getattr(metric, 'inc', lambda: metric.observe(1))()
    return True
assert at_once(work) == [True] * 3
assert len(os.listdir(os.environ['PROMETHEUS_MULTIPROC_DIR'])) == 3
''', env={'PROMETHEUS_MULTIPROC_DIR': disk_folder}, timeout=40)


def test_first_look_at_a_time_zone_by_greenlets(disk_folder):
    missing_module('dateutil')
    with open(f'{disk_folder}/zone', 'wb') as file:
        file.write(b'TZif'.ljust(20, b'\0') + struct.pack('>6llbb', 0, 0, 0, 0, 1, 4, 3600, 0, 0) + b'CET\0')
    run_python('import dateutil.tz\n' + EARLY + '''
names = [os.path.join(sys.argv[1], str(i)) for i in range(3)]
for name in names:
    with open(name, 'wb') as file:
        with open(os.path.join(sys.argv[1], 'zone'), 'rb') as zone:
            file.write(zone.read())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
zones = at_once(lambda i: dateutil.tz.gettz(names[i]))
assert all(isinstance(zone, dateutil.tz.tzfile) for zone in zones), zones
''', disk_folder, timeout=40)


def test_a_lock_that_is_held_is_not_replaced_and_unpatching_puts_back():
    run_python('''
        import tempfile, threading, webbrowser
        import gevent.monkey
        before = tempfile._once_lock, webbrowser._lock
        gevent.monkey.patch_all()
        import greenaio.monkey
        with before[0], before[1]:
            greenaio.monkey.patch_all()
        assert (tempfile._once_lock, webbrowser._lock) == before
        for _ in range(2):
            greenaio.monkey.patch_all()
            greenaio.monkey.patch_all()
            assert tempfile._once_lock is not before[0] and webbrowser._lock is not before[1]
            assert isinstance(webbrowser._lock, type(threading.RLock()))
            greenaio.monkey.unpatch_all()
            assert (tempfile._once_lock, webbrowser._lock) == before
    ''')
