"""All the long commands in turn, at random, for hours: ``python -m tests.soak --hours 72``.

One seed names the run. Each turn is some rounds of one of them in a fresh folder; they look at greenaio's
counters throughout, and here, between turns, at those of the process. A line a minute tells what was done.
The status is 1 at the first thing that does not hold, and the command that repeats it is printed.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback

import gevent

from greenaio._core import hub as _hub
from tests.faults import forks, fsx, hubs, kills, long, power_cut
from tests.support.disks import real_disk

MODULES = {'kills': kills.rounds, 'forks': forks.rounds, 'hubs': hubs.rounds, 'fsx': fsx.rounds,
           'power_cut': power_cut.rounds}
UNITS = {'kills': 'kills', 'forks': 'forks', 'hubs': 'cycles', 'fsx': 'ops', 'power_cut': 'cuts'}
ROUNDS = {'power_cut': 3, 'forks': 10, 'hubs': 2}  # of a turn, instead of 20
MINUTE = 60                     # seconds


def turns(rng):
    """What to do next, for ever: a name, and what its rounds want to know."""
    kinds = [kind for kind in power_cut.SIZE if os.geteuid() == 0 and shutil.which(f'mkfs.{kind}')]
    names = [name for name in MODULES if kinds or name != 'power_cut']
    while True:
        name = rng.choice(names)
        yield name, {'type': rng.choice(kinds), 'no_flush': False} if name == 'power_cut' else {}


def one_turn(name, chosen, where, seed, done):
    with MODULES[name](where, **chosen) as one_round:
        for number in range(ROUNDS.get(name, 20)):
            done['seed'] = seed + number
            signal.alarm(2 * long.PATIENCE)
            with gevent.Timeout(long.PATIENCE):
                done[UNITS[name]] += one_round(seed + number)


def main():
    parser = long.parser('tests.soak', __doc__)
    parser.add_argument('--hours', type=float, default=24)
    arguments = parser.parse_args()
    long.catch_signals()
    rng, done = random.Random(arguments.seed), dict.fromkeys(UNITS.values(), 0)
    began = told = time.monotonic()
    name, chosen = None, {}
    _hub.get_driver()                   # what this process has and keeps
    before = hubs.counts()

    def tell(what=''):
        counts = ', '.join(f'{done[unit]} {unit}' for unit in UNITS.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        hours = (time.monotonic() - began) / 3600
        print(f'{hours:.2f} h: {counts}, {peak} MiB at most{what}', file=sys.stderr, flush=True)

    print(f'tests.soak: seed {arguments.seed}', file=sys.stderr, flush=True)
    try:
        for name, chosen in turns(rng):
            with long.own_folder(arguments.folder or real_disk()) as where:
                one_turn(name, chosen, where, rng.randrange(1 << 31), done)
            assert hubs.counts() == before, f'{before} at first, {hubs.counts()} now'
            if time.monotonic() - told > MINUTE:
                told = time.monotonic()
                tell()
            if time.monotonic() - began > arguments.hours * 3600:
                break
    except KeyboardInterrupt:
        tell(f'; interrupted, seed {arguments.seed}')
        return 130
    except SystemExit:
        raise                           # a child's
    except BaseException:
        traceback.print_exc()
        options = f" --type {chosen['type']}" if chosen else ''
        tell(f'; seed {arguments.seed}; again: python -m tests.faults.{name} --{UNITS.get(name)} 1{options} '
             f"--seed {done.get('seed')}")
        return 1
    finally:
        signal.alarm(0)
    tell('; all is well')
    return 0


if __name__ == '__main__':
    sys.exit(main())
