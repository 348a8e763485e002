"""A long command is rounds until enough is done, each a function of its seed, so that one can be had again.

The first has the seed that was given, each other the next: one seed names the whole run. What is done stands
on stderr every ten seconds, and at Ctrl-C. The status is 1 at the first thing that does not hold.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import gevent

from tests.support.disks import real_disk

EVERY = 10                      # seconds between two signs of life
PATIENCE = 120                  # seconds: no round lasts half as long, on a busy machine


def parser(name, doc):
    parser = argparse.ArgumentParser(prog=f'python -m {name}', description=doc)
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument('--folder', help='where the files are, and so the disk; by default a real one')
    return parser


@contextlib.contextmanager
def own_folder(folder):
    where, owner = tempfile.mkdtemp(dir=folder, prefix='greenaio-long-'), os.getpid()
    try:
        yield where
    finally:
        if os.getpid() == owner:        # and not a child that exits
            shutil.rmtree(where)


def catch_signals():
    # Not dump_traceback_later(): a forked child would wait at its exit for the thread of that.
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # or it would leave mounts behind


def main(name, doc, unit, count, rounds, **options):
    """*rounds*, given a folder and the values of *options*, is a context manager of a function: of a seed, it
    returns how many of *unit* were done."""
    arguments = parser(name, doc)
    arguments.add_argument(f'--{unit}', type=int, default=count)
    for option, how in options.items():
        arguments.add_argument(f'--{option.replace("_", "-")}', **how)
    arguments = vars(arguments.parse_args())
    chosen = {option: arguments[option] for option in options}
    return repeat(name, unit, arguments[unit], arguments['seed'], arguments['folder'], rounds, chosen)


def repeat(name, unit, count, seed, folder, rounds, chosen):
    again = ' '.join([f'python -m {name} --{unit} 1', *(
        f'--{option.replace("_", "-")}' + ('' if value is True else f' {value}')
        for option, value in [*chosen.items(), ('folder', folder)] if value not in (None, False))])
    done, began, told = 0, time.monotonic(), time.monotonic()

    def tell(what=''):
        rate = done / (time.monotonic() - began + 1e-9)
        print(f'{done} of {count} {unit}, {rate:.0f}/s, now seed {seed}{what}', file=sys.stderr, flush=True)

    catch_signals()
    print(f'{name}: seed {seed}', file=sys.stderr, flush=True)
    with own_folder(folder or real_disk()) as where:
        try:
            with rounds(where, **chosen) as one_round:
                while done < count:
                    signal.alarm(2 * PATIENCE)      # if even the hub stands still
                    with gevent.Timeout(PATIENCE):
                        done += one_round(seed)
                    seed += 1
                    if time.monotonic() - told > EVERY:
                        told = time.monotonic()
                        tell()
        except KeyboardInterrupt:
            tell('; interrupted')
            return 130
        except SystemExit:
            raise                       # a child's
        except BaseException:
            traceback.print_exc()
            tell(f'; again: {again} --seed {seed}')
            return 1
        finally:
            signal.alarm(0)
    tell('; all is well')
    return 0
