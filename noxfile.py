"""One command for each thing to be checked: ``nox -l`` lists them, ``nox -s lint quick`` runs two.

Each session runs a stage of ``.ci/stage`` in an environment of its own, over a copy of the clone. Arguments
behind ``--`` go to pytest: ``nox -s tests -- tests/test_wsgi.py``. Without a name, ``nox`` runs ``lint`` and
``quick``.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import nox

PYTHONS = ['3.10', '3.11', '3.12', '3.13']
MAIN = '3.11'
ROOT = pathlib.Path(__file__).parent
SMOKE = ROOT / 'tests' / 'smoke.py'
CONSTRAINTS = ROOT / '.ci' / 'constraints.txt'
# The rest of what git has goes into the sdist.
NOT_SHIPPED = ('.git', '.github', '.pre-commit-config.yaml')

nox.options.sessions = ['lint', 'quick']
nox.options.error_on_missing_interpreters = False
nox.needs_version = '>=2024.4.15'

# pyenv's are found too.
_versions = pathlib.Path(os.environ.get('PYENV_ROOT', pathlib.Path.home() / '.pyenv')) / 'versions'
os.environ['PATH'] = os.pathsep.join([os.environ['PATH'], *map(str, sorted(_versions.glob('3.*/bin')))])


def stage(session: nox.Session, name: str, *args: str | pathlib.Path, extras: str = 'test') -> None:
    """Build a copy of the clone, and run a stage of ``.ci/stage`` in it."""
    copy_of_the_tree(session)
    session.install('-c', CONSTRAINTS, f'.[{extras}]')
    session.run('bash', '.ci/stage', name, *args, external=True)


@nox.session(python=MAIN)
def lint(session: nox.Session) -> None:
    """Run ruff and mypy, compare the stubs with the modules, see that the mutants fit."""
    session.install('-c', CONSTRAINTS, 'ruff')
    session.run('bash', ROOT / '.ci' / 'stage', 'style', external=True)     # ruff passes over a copy in .nox
    stage(session, 'types', extras='test,lint')


@nox.session(python=MAIN)
def quick(session: nox.Session) -> None:
    """Run a part of all tests, which any user may: two minutes."""
    stage(session, 'quick', *session.posargs)


@nox.session(python=MAIN)
def tests(session: nox.Session) -> None:
    """Run all tests, or the named ones; root and many tools are needed for all: half an hour."""
    stage(session, 'tests', *session.posargs)


@nox.session(python=PYTHONS)
def compiled(session: nox.Session) -> None:
    """Run the tests of what is compiled, on each Python: `nox -s compiled-3.12`."""
    stage(session, 'compiled', *session.posargs)


@nox.session(python=MAIN)
def faults(session: nox.Session) -> None:
    """Run the tests in which disks freeze, fail, fill up and lose power."""
    stage(session, 'faults', *session.posargs)


@nox.session(python=MAIN)
def long(session: nox.Session) -> None:
    """Run the mutants, other projects' suites, the sanitizers, a million histories, the soak: some hours."""
    stage(session, 'long')


@nox.session(python=MAIN)
def bench(session: nox.Session) -> None:
    """Measure beside fio, qemu-img and caio; compare the instructions per request with the baseline."""
    stage(session, 'bench')


@nox.session(python=MAIN)
def docs(session: nox.Session) -> None:
    """Build the site without a warning."""
    site = pathlib.Path(session.create_tmp()).resolve() / 'site'
    stage(session, 'docs', site, extras='docs,metrics,wsgi')
    session.log(f'{site}/index.html')


@nox.session(python=PYTHONS)
def release(session: nox.Session) -> None:
    """Build the sdist and a wheel of it; do real I/O by that wheel where the source is out of sight."""
    folder = build(session)
    sdist, = folder.glob('*.tar.gz')
    wheel, = folder.glob('*.whl')
    check_sdist(sdist)
    check_wheel(wheel)
    session.install(wheel, 'cffi')      # which gevent's libuv is made with
    session.chdir(session.create_tmp())
    for loop in ('libev-cext', 'libuv-cffi'):
        session.run('python', SMOKE, env={'GEVENT_LOOP': loop})
    session.run('python', '-m', 'greenaio', '--version')


@nox.session(python=MAIN)
def no_compiler(session: nox.Session) -> None:
    """Install the sdist without a compiler, and again without Cython; greenaio works by threads."""
    sdist, = build(session, '--sdist').glob('*.tar.gz')
    session.install(sdist, env={'CC': '/bin/false'})
    session.chdir(session.create_tmp())
    session.run('python', SMOKE, '--threads')
    session.install('setuptools')
    session.install('--no-build-isolation', '--no-deps', '--force-reinstall', '--no-cache-dir', sdist)
    session.run('python', SMOKE, '--threads')


def copy_of_the_tree(session: nox.Session) -> pathlib.Path:
    """Copy the files that git tracks, without the modules that another Python has built. The session goes on
    in the copy."""
    folder = pathlib.Path(session.create_tmp()) / 'source'
    shutil.rmtree(folder, ignore_errors=True)
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    session.chdir(folder)
    return folder


def tracked() -> list[str]:
    done = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split('\0') if name and (ROOT / name).exists()]


def build(session: nox.Session, *what: str) -> pathlib.Path:
    copy_of_the_tree(session)
    folder = pathlib.Path(session.create_tmp()) / 'dist'
    shutil.rmtree(folder, ignore_errors=True)
    session.install('-c', CONSTRAINTS, 'build')
    session.run('python', '-m', 'build', '-o', folder, *what, silent=True)
    return folder


def check_sdist(path: pathlib.Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    expected = {name for name in tracked() if not name.startswith(NOT_SHIPPED)}
    assert expected <= names, f'the sdist lacks {sorted(expected - names)}'
    rubbish = [name for name in names if name.endswith(('.so', '.pyc')) or name.startswith('greenaio/')
               and name.endswith('.c')]
    assert not rubbish, f'the sdist has {rubbish}'


def check_wheel(path: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(path).namelist())
    for source in sorted(ROOT.glob('greenaio/**/*.pyx')):
        module = source.relative_to(ROOT).with_suffix('')
        assert f'{module}.pyi' in names
        assert any(name.startswith(f'{module}.c') and name.endswith('.so') for name in names)
    assert 'greenaio/py.typed' in names
    rubbish = [name for name in names if name.endswith(('.c', '.pyc')) or not name.startswith('greenaio')]
    assert not rubbish, f'the wheel has {rubbish}'
