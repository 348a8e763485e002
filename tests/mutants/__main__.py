"""Show that the suite notices a broken promise: ``python -m tests.mutants [NAME ...]``.

Each mutant of this folder breaks one promise of the code (`edits` says how it is written). It is applied
to a built copy of the project, where at least one of its tests must fail. The command prints the first
test that failed for each mutant. A mutant that passes its tests is a hole in the suite.

``python -m tests.mutants --fit`` says in a second which mutants no longer find their place in the code.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from tests.mutants.edits import HERE, ROOT, Mutant, Sources, names

# Seconds for the tests of one mutant. A mutant that hangs is caught, too.
TIMEOUT = 400


def copy_to(folder):
    """Copy the project with its built modules, so that only an edited module is built again."""
    shutil.copytree(ROOT, folder, symlinks=True,
                    ignore=shutil.ignore_patterns('.git', '.venv', '__pycache__', '.*_cache', '.hypothesis'))


def build(folder):
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'build_ext', '--inplace'], cwd=folder,
                          capture_output=True, text=True)
    if 'rror' in done.stderr:
        raise RuntimeError(done.stderr)


def first_failure(folder, tests):
    """Run *tests* in *folder*; return the first that fails, hangs or crashes, None if all pass."""
    environment = {**os.environ, 'PYTHONPATH': folder, 'PYTHONFAULTHANDLER': '1'}
    with subprocess.Popen([sys.executable, '-m', 'pytest', '-x', '-v', '-p', 'no:cacheprovider', *tests],
                          cwd=folder, env=environment, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, how = process.communicate(timeout=TIMEOUT)[0], ''
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, how = process.communicate()[0], ' (hangs)'
    if process.returncode == 0:
        return None
    failed = re.findall(r'^(\S+::.+?) (?:FAILED|ERROR)', output, re.MULTILINE)
    if not failed and process.returncode > 0:
        raise RuntimeError(output)
    if not failed:
        failed = re.findall(r'^(\S+::\S+)', output, re.MULTILINE)[-1:] or ['(before any test)']
        how = how or f' (crashes, signal {-process.returncode})'
    return failed[0] + how


def catch(mutant, built):
    with tempfile.TemporaryDirectory(prefix='greenaio-mutant-') as folder:
        copy = os.path.join(folder, 'greenaio')
        shutil.copytree(built, copy, symlinks=True)
        mutant.write(pathlib.Path(copy))
        build(copy)
        return first_failure(copy, mutant.tests)


def print_misfits(mutants):
    """Print which of *mutants* do not fit the code; return how many they are."""
    sources = Sources()
    misfits = {mutant.name: reason for mutant in mutants if (reason := mutant.misfit(sources))}
    for name, reason in misfits.items():
        print(f'{name}: {reason}')
    return len(misfits)


def print_catches(mutants, jobs):
    """Run *mutants*, print which test caught which; return how many were not caught."""
    missed = 0
    with tempfile.TemporaryDirectory(prefix='greenaio-mutant-') as folder:
        built = os.path.join(folder, 'greenaio')
        copy_to(built)
        build(built)
        for test in sorted({test for mutant in mutants for test in mutant.tests}):
            if failure := first_failure(built, [test]):
                sys.exit(f'fails without any mutant: {failure}')
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for mutant, caught in zip(mutants, pool.map(lambda mutant: catch(mutant, built), mutants)):
                print(f'{mutant.name:32} {caught or "NOT CAUGHT"}', flush=True)
                missed += caught is None
    print(f'{len(mutants) - missed} of {len(mutants)} mutants caught')
    return missed


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.mutants', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', default=names(), help='by default all')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--fit', action='store_true', help='only check that each finds its place in the code')
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in names():
            parser.error(f'there is no {name}.mutant in {HERE}')
    mutants = [Mutant.read(name) for name in arguments.names]
    return 1 if print_misfits(mutants) or not arguments.fit and print_catches(mutants, arguments.jobs) else 0


if __name__ == '__main__':
    sys.exit(main())
