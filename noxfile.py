"""greenaio on each Python that is here: ``nox``, or one of ``nox -s tests-3.12 package-3.12 no_compiler``."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import nox

PYTHONS = ['3.10', '3.11', '3.12', '3.13']
ROOT = pathlib.Path(__file__).parent
SMOKE = ROOT / 'tests' / 'smoke.py'
# Of what git has, all goes into the sdist but this.
NOT_SHIPPED = ('.git', '.github')

nox.options.error_on_missing_interpreters = False
nox.needs_version = '>=2024.4.15'

# pyenv's are found too.
_versions = pathlib.Path(os.environ.get('PYENV_ROOT', pathlib.Path.home() / '.pyenv')) / 'versions'
os.environ['PATH'] = os.pathsep.join([os.environ['PATH'], *map(str, sorted(_versions.glob('3.*/bin')))])


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests of what is compiled, or those that are named: ``nox -s tests-3.12 -- tests/test_wsgi.py``."""
    source = copy_of_the_tree(session)
    session.install('.[test]')
    session.run('python', '-m', 'pytest', '-q', *(session.posargs or [f'@{source}/tests/compiled.txt']))


@nox.session(python=PYTHONS)
def package(session: nox.Session) -> None:
    """The sdist, a wheel made of it, and real I/O by that wheel where the source is out of sight."""
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


@nox.session(python=PYTHONS[1])
def no_compiler(session: nox.Session) -> None:
    """The sdist installs without a compiler, and greenaio works by threads."""
    sdist, = build(session, '--sdist').glob('*.tar.gz')
    session.install(sdist, env={'CC': '/bin/false'})
    session.chdir(session.create_tmp())
    session.run('python', SMOKE, '--threads')


@nox.session(python=PYTHONS[1])
def docs(session: nox.Session) -> None:
    """The site, without a warning."""
    site = pathlib.Path(session.create_tmp()) / 'site'
    copy_of_the_tree(session)
    session.install('.[docs]')
    session.run('python', '-m', 'sphinx', '-W', '--keep-going', '-q', 'docs', site)
    session.log(f'{site}/index.html')


def copy_of_the_tree(session: nox.Session) -> pathlib.Path:
    """What git has, as it is here now: no module that another Python has built. The session goes on in it."""
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
    session.install('build')
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
    sources = sorted(ROOT.glob('greenaio/*.pyx'))
    for source in sources:
        assert f'greenaio/{source.stem}.pyi' in names
        assert any(name.startswith(f'greenaio/{source.stem}.c') and name.endswith('.so') for name in names)
    assert 'greenaio/py.typed' in names
    rubbish = [name for name in names if name.endswith(('.c', '.pyc')) or not name.startswith('greenaio')]
    assert not rubbish, f'the wheel has {rubbish}'
