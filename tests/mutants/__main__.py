"""Does the suite see what it is for? ``python -m tests.mutants [NAME ...]``: each patch of this folder breaks
one promise. It is applied to a built copy of the project, and the tests that it names must fail there. Prints
which test caught which; one that passes them all is a hole in the suite.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TIMEOUT = 400                   # seconds for the tests of one mutant: one that hangs is caught, too


def names():
    return sorted(name[:-6] for name in os.listdir(HERE) if name.endswith('.patch'))


def read(name):
    """The patch's text: a line that says what it breaks, one that names tests, the diff."""
    with open(os.path.join(HERE, f'{name}.patch')) as file:
        return file.read()


def tests_of(name):
    return re.search(r'^Tests: (.*)$', read(name), re.MULTILINE)[1].split()


def copy_to(folder):
    """The project as it is here, with what was built, so that only what a patch touches is built again."""
    shutil.copytree(ROOT, folder, symlinks=True,
                    ignore=shutil.ignore_patterns('.git', '__pycache__', '.*_cache', '.hypothesis'))


def apply(name, folder, *options):
    command = ['patch', '-p1', '-s', '-F0', *options]
    subprocess.run(command, input=read(name), cwd=folder, text=True, check=True)


def fits(name):
    try:
        apply(name, ROOT, '--dry-run')
    except subprocess.CalledProcessError:
        return False
    return True


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


def catch(name, built):
    with tempfile.TemporaryDirectory(prefix='greenaio-mutant-') as folder:
        folder = os.path.join(folder, 'greenaio')
        shutil.copytree(built, folder, symlinks=True)
        apply(name, folder)
        build(folder)
        return first_failure(folder, tests_of(name))


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.mutants', description=__doc__)
    parser.add_argument('names', nargs='*', metavar='NAME', default=names(),
                        help='all, unless some are named')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--dry-run', action='store_true', help='only see whether they fit the code')
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in names():
            parser.error(f'there is no {name}.patch in {HERE}')
    missed = 0
    if arguments.dry_run:
        for name in arguments.names:
            if not fits(name):
                print(f'does not fit: {name}')
                missed += 1
        return 1 if missed else 0
    with tempfile.TemporaryDirectory(prefix='greenaio-mutant-') as folder:
        built = os.path.join(folder, 'greenaio')
        copy_to(built)
        build(built)
        for test in sorted({test for name in arguments.names for test in tests_of(name)}):
            if failure := first_failure(built, [test]):
                print(f'fails without any mutant: {failure}')
                return 2
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda name: catch(name, built), arguments.names)
            for name, caught in zip(arguments.names, results):
                print(f'{name:32} {caught or "NOT CAUGHT"}', flush=True)
                missed += caught is None
    print(f'{len(arguments.names) - missed} of {len(arguments.names)} mutants caught')
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
