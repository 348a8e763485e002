"""Run a suite with gevent alone and with greenaio, each in the same environment, and compare test by test."""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).parents[2]
SITE = pathlib.Path(__file__).with_name('site')
LIBEV, LIBUV = 'libev-cext', 'libuv-cffi'
PLAIN = 'gevent'
PATCHED = 'greenaio'
# cffi is for the libuv of gevent.
GEVENT = ('gevent==26.9.0', 'cffi==2.1.1')
PYTEST = ('pytest==8.4.2',)
TIMEOUT = 900                  # seconds for one part of a suite
# A test that measures time fails now and then: a difference counts if it is there in each of the rounds.
ROUNDS = 3

Environment = Mapping[str, str]
Outcomes = dict[str, str]       # by test: passed, failed or skipped
Pairs = dict[str, tuple[str, str]]      # by test: its outcome with gevent alone, and with greenaio
# The process stands among its tests under this name, because it may crash after the last one.
RUN = '(the run)'


@dataclass(frozen=True)
class Suite:
    """The tests of another project.

    *source* is a requirement such as ``flask==3.1.3``, whose sdist has the tests, or the URL of a repository
    with ``@`` and a tag; empty if an installed package has them. *parts* are command lines for Python: each
    runs by itself and writes a JUnit file, or a folder of such files, to ``{results}``. A part whose command
    does not say ``{results}`` is a single test, which ends with 0.
    """

    parts: Mapping[str, Sequence[str]]
    source: str = ''
    requires: Sequence[str] = ()
    loops: Sequence[str] = (LIBEV,)
    # Environments to compare with that of `PLAIN`, by name.
    modes: Mapping[str, Environment] = field(default_factory=lambda: {PATCHED: {'GREENAIO_PATCH': '1'}})
    # Whether its tests call patch_all() by themselves.
    patches: bool = False
    # Commands that have to be there, with the Debian package of each.
    commands: Mapping[str, str] = field(default_factory=dict)
    # How its runner ends if it ran all tests, though some of them failed.
    statuses: Sequence[int] = (0, 1)
    # Patterns of tests that differ from gevent alone, each with the reason.
    differences: Mapping[str, str] = field(default_factory=dict)


def pytest_of(*arguments: str) -> list[str]:
    return ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--junitxml={results}', *arguments]


@dataclass(frozen=True)
class Difference:
    part: str
    test: str
    plain: str
    patched: str
    reason: str                 # empty if it is a fault

    def __str__(self) -> str:
        outcomes = f'{self.plain} with gevent, {self.patched} with greenaio'
        return ': '.join(filter(None, [f'{self.part} {self.test}', outcomes, self.reason]))


# Environments -------------------------------------------------------------------------------------

def build_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Return a wheel of the greenaio in this clone. Modules that were built in the clone are used again."""
    copy = folder / 'greenaio'
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(
        '.git', '.venv', '.*_cache', '.hypothesis', '__pycache__', 'build', '*.egg-info'))
    wheels = folder / 'wheels'
    shutil.rmtree(wheels, ignore_errors=True)
    call(folder, sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(wheels), str(copy))
    wheel, = wheels.iterdir()
    return wheel


class Place:
    """A folder with an environment for one suite, and with the source of its project."""

    def __init__(self, suite: Suite, folder: pathlib.Path) -> None:
        self.suite, self.folder = suite, folder
        self.python = folder / 'venv' / 'bin' / 'python'
        self.source = folder / 'source'
        self.results = folder / 'results'

    def prepare(self, wheel: pathlib.Path) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            self._get_source()
        if not self.python.exists():
            call(self.folder, sys.executable, '-m', 'venv', 'venv')
        self._install(*GEVENT, *self.suite.requires)
        self._install('--force-reinstall', '--no-deps', str(wheel))
        for mode in [PLAIN, *self.suite.modes]:
            self._check(self._environment(self.suite.loops[0], mode))

    def _check(self, environment: Environment) -> None:
        """Raise CalledProcessError unless greenaio is compiled, and patches as *environment* says."""
        expected = environment['GREENAIO_PATCH'] == '1'
        code = f'''
import sys, gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey
sys.exit(not greenaio.native or greenaio.monkey.is_patched() is not {expected})'''
        subprocess.run([str(self.python), '-c', code], cwd=self.folder, check=True,
                       env={**clean_environment(), **environment})

    def _install(self, *arguments: str) -> None:
        call(self.folder, str(self.python), '-m', 'pip', 'install', '-q', '--disable-pip-version-check',
             *arguments)

    def _get_source(self) -> None:
        source = self.suite.source
        if not source:
            self.source.mkdir()
        elif '://' in source:
            url, _, tag = source.rpartition('@')
            call(self.folder, 'git', '-c', 'advice.detachedHead=false', 'clone', '-q', '--depth=1',
                 '--branch', tag, url, 'source')
        else:
            self._get_sdist(source)

    def _get_sdist(self, requirement: str) -> None:
        call(self.folder, sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary=:all:',
             '-d', 'sdist', requirement)
        sdist, = (self.folder / 'sdist').iterdir()
        shutil.unpack_archive(sdist, self.folder / 'unpacked')
        unpacked, = (self.folder / 'unpacked').iterdir()
        unpacked.rename(self.source)

    def run(self, part: str, loop: str, mode: str) -> Outcomes:
        """Run *part*; return the outcome of each test, and how the process ended."""
        results = self.results / f'{part}-{loop}-{mode}'
        delete(results)
        command = [argument.format(results=results) for argument in self.suite.parts[part]]
        environment = {**clean_environment(), **self._environment(loop, mode)}
        with open(f'{results}.log', 'wb') as log:
            status = run_group([str(self.python), *command], self.source, environment, log.fileno())
        if command == [*self.suite.parts[part]]:
            outcomes = {part: 'failed' if status else 'passed'}
        else:
            outcomes = read_junit(results)
        ended = 'complete' if status in self.suite.statuses and outcomes else f'ended with {status}'
        return {**outcomes, RUN: ended}

    def log(self, part: str, loop: str, mode: str) -> str:
        """Return what the last such run printed."""
        return (self.results / f'{part}-{loop}-{mode}.log').read_text(errors='replace')

    def _environment(self, loop: str, mode: str) -> Environment:
        # Paths of the environment first: some tests start what was installed.
        environment = {'GEVENT_LOOP': loop, 'PYTHONFAULTHANDLER': '1',
                       'PATH': os.pathsep.join([str(self.python.parent), os.environ['PATH']])}
        if not self.suite.patches:
            environment['PYTHONPATH'] = str(SITE)
        return {**environment, **(self.suite.modes[mode] if mode != PLAIN else {'GREENAIO_PATCH': '0'})}


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items()
            if not name.startswith(('GEVENT', 'GREENAIO', 'PYTHON', 'PYTEST'))}


def call(folder: pathlib.Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, env=clean_environment())


def run_group(command: Sequence[str], folder: pathlib.Path, environment: Environment, log: int) -> int:
    """Return the exit status of *command*, which is killed with its children after `TIMEOUT`."""
    with (tempfile.TemporaryDirectory(prefix='suite-', ignore_cleanup_errors=True) as scratch,
          subprocess.Popen(command, cwd=folder, env={**environment, 'TMPDIR': scratch}, stdout=log,
                           stderr=log, stdin=subprocess.DEVNULL, start_new_session=True) as process):
        try:
            return process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            return -signal.SIGALRM
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def delete(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Results ------------------------------------------------------------------------------------------

def read_junit(path: pathlib.Path) -> Outcomes:
    """Return the outcome of each test. There is no file if the process died before it wrote one."""
    outcomes: Outcomes = {}
    seen: collections.Counter[str] = collections.Counter()
    for file in sorted(path.rglob('*.xml')) if path.is_dir() else [path]:
        if not file.exists():
            continue
        for case in xml.etree.ElementTree.parse(file).iter('testcase'):
            name = '.'.join(filter(None, [case.get('classname'), case.get('name')]))
            seen[name] += 1
            if seen[name] > 1:
                name = f'{name} ({seen[name]})'
            outcomes[name] = outcome_of(case)
    return outcomes


def outcome_of(case: xml.etree.ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    if kinds & {'failure', 'error'}:
        return 'failed'
    return 'skipped' if 'skipped' in kinds else 'passed'


def count(outcomes: Outcomes) -> dict[str, int]:
    """Return how many tests there are, and how many failed and were skipped."""
    counts = collections.Counter(outcome for test, outcome in outcomes.items() if test != RUN)
    return {'tests': sum(counts.values()), 'failed': counts['failed'], 'skipped': counts['skipped']}


# Comparing ----------------------------------------------------------------------------------------

@dataclass
class Row:
    """One mode of a suite: what its tests came to, and where they differ from those of gevent alone."""

    loop: str
    mode: str
    counts: collections.Counter[str]
    differences: list[Difference]


def compare(place: Place, parts: Sequence[str]) -> Iterator[Row]:
    """Run *parts* of the suite in all modes, one after the other."""
    for loop in place.suite.loops:
        rows = {mode: Row(loop, mode, collections.Counter(), []) for mode in [PLAIN, *place.suite.modes]}
        for part in parts:
            plain = place.run(part, loop, PLAIN)
            if plain[RUN] != 'complete':
                print(place.log(part, loop, PLAIN)[-4000:], file=sys.stderr)
                rows[PLAIN].differences.append(Difference(part, RUN, plain[RUN], 'not run', ''))
                continue
            rows[PLAIN].counts.update(count(plain))
            for mode in place.suite.modes:
                patched = place.run(part, loop, mode)
                rows[mode].counts.update(count(patched))
                found = differing(plain, patched)
                faults = steady(place, part, loop, mode, found)
                rows[mode].differences += [
                    Difference(part, test, *pair, '' if test in faults else
                               reason_for(place.suite, test) or 'not in each round')
                    for test, pair in found.items()]
        yield from rows.values()


def differing(plain: Outcomes, patched: Outcomes) -> Pairs:
    tests = sorted(plain.keys() | patched.keys())
    pairs = {test: (plain.get(test, 'missing'), patched.get(test, 'missing')) for test in tests}
    return {test: pair for test, pair in pairs.items() if pair[0] != pair[1]}


def steady(place: Place, part: str, loop: str, mode: str, found: Pairs) -> Pairs:
    """Return the tests of *found* without a reason that differ in the same way in further rounds."""
    found = {test: pair for test, pair in found.items() if not reason_for(place.suite, test)}
    for _ in range(ROUNDS - 1):
        if not found:
            break
        again = differing(place.run(part, loop, PLAIN), place.run(part, loop, mode))
        found = {test: pair for test, pair in found.items() if again.get(test) == pair}
    return found


def reason_for(suite: Suite, test: str) -> str:
    reasons = suite.differences.items()
    return next((reason for pattern, reason in reasons if fnmatch.fnmatchcase(test, pattern)), '')
