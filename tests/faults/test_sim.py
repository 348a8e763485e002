"""Some thousand histories of the driver over a simulated kernel; a million are `python -m tests.sim`."""

import pytest

from tests import sim


@pytest.mark.parametrize('first', range(0, 4000, 1000))
def test_every_history_ends_well(first):
    failed = sim.run_many(first, 1000)
    for seed, trace in failed[:3]:
        print(f'python -m tests.sim --trace --first {seed}', trace, sep='\n')
    assert not failed


def test_same_seed_is_the_same_history():
    assert [sim.run(seed) for seed in range(100)] == [sim.run(seed) for seed in range(100)]


def test_different_seeds_are_different_histories():
    assert len({repr(sim.run(seed)) for seed in range(100)}) == 100
