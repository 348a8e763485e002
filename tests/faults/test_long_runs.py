"""The long commands, briefly: each ends well, and tells when it doesn't. What they are for is days."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import missing

ROOT = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir)


def run_long(module, *args, status=0):
    done = subprocess.run([sys.executable, '-m', f'tests.{module}', *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.parametrize('module, unit, count', [
    ('kills', 'kills', 2000), ('forks', 'forks', 16), ('hubs', 'cycles', 100), ('fsx', 'ops', 6000)])
def test_all_is_well(module, unit, count, folder):
    told = run_long(f'faults.{module}', f'--{unit}', count, '--seed', 1, '--folder', folder)
    assert 'all is well' in told


def test_kills_find_requests_everywhere(disk_folder):
    told = run_long('faults.kills', '--kills', 4000, '--folder', disk_folder)
    for where in ('before', 'queued', 'in flight', 'with a thread', 'done', 'timed out'):
        assert f"'{where}'" in told


@pytest.fixture(params=['ext4', 'xfs'])
def kind(request):
    if os.geteuid() != 0:
        missing('needs root')
    for tool in ('losetup', f'mkfs.{request.param}'):
        if shutil.which(tool) is None:
            missing(f'needs {tool}')
    return request.param


def test_what_was_synced_survives_the_cut(kind):
    assert 'all is well' in run_long('faults.power_cut', '--cuts', 2, '--type', kind, '--folder', '/dev/shm')


def test_what_was_not_synced_is_missed_and_the_seed_is_told(kind):
    told = run_long('faults.power_cut', '--cuts', 5, '--type', kind, '--no-flush', '--seed', 7,
                    '--folder', '/dev/shm', status=1)
    assert 'blocks were synced' in told or 'was synced' in told
    assert f'again: python -m tests.faults.power_cut --cuts 1 --type {kind} --no-flush --folder' in told
    assert '--seed ' in told.splitlines()[-1]


def test_soak_takes_turns(disk_folder):
    told = run_long('soak', '--hours', 0.0003, '--folder', disk_folder, '--seed', 3)
    assert 'all is well' in told
