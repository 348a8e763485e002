"""Other processes: Python, programs, examples, commands of the shell."""

from __future__ import annotations

import concurrent.futures
import configparser
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLES = ROOT / 'examples'
PROGRAMS = ROOT / 'tests' / 'programs'
COMPILED = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
            for path in sorted(ROOT.glob('greenaio/*/*.pyx'))]
# The first lines of a program that is to find no compiled module: importing one raises ImportError.
HIDE_EXTENSION = f'import sys\nsys.modules.update(dict.fromkeys({COMPILED}))\n'
CONTROL = PROGRAMS / 'control.py'       # how long the machine itself stood still


def side_by_side(request, test, work):
    """Call ``work(**parameters)`` for each test named *test* of this run, as many at once as there are
    processors. Return the finished futures by the names of the tests. *work* measures no time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return {item.name: pool.submit(work, **item.callspec.params) for item in request.session.items
                if item.originalname == test}


def aio_nr():
    with open('/proc/sys/fs/aio-nr') as file:
        return int(file.read())


def contexts():
    """Return the number of contexts of native AIO that this process has. aio-nr counts all of the machine."""
    with open('/proc/self/maps') as maps:
        return sum('[aio]' in line for line in maps)


def run_python(code, *args, extension=True, **kwargs):
    """Run *code* in a fresh interpreter; return the finished process, its output as text. Without *extension*
    greenaio is there as after an install with no compiler.

    A program of more than 24 lines is a file of ``tests/programs``, for `run_program`.
    """
    code = ('' if extension else HIDE_EXTENSION) + textwrap.dedent(code)
    return _run_interpreter(['-c', code], args, **kwargs)


def run_program(name, *args, **kwargs):
    """Run a file of ``tests/programs`` in a fresh interpreter; return the finished process."""
    return _run_interpreter([PROGRAMS / f'{name}.py'], args, **kwargs)


def _run_interpreter(program, args, options=(), env=None, timeout=60, check=True):
    env = {**os.environ, **(env or {})}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [env.get('PYTHONPATH'), str(ROOT)]))
    done = subprocess.run([sys.executable, *options, *program, *map(str, args)], capture_output=True,
                          text=True, timeout=timeout, env=env)
    if check:
        assert done.returncode == 0, done.stderr
        assert done.stderr == '', done.stderr
    return done


def run_example(name, *args, cwd=None, text=False, timeout=60):
    """Run an example as a user would; return the finished process, its output as bytes unless *text*."""
    return subprocess.run([sys.executable, EXAMPLES / f'{name}.py', *args], capture_output=True, text=text,
                          cwd=cwd, timeout=timeout)


def run_in_shell(command, redirection, *, before='', env=None, cwd=None):
    """Run *command* in a shell that redirects its output; return the finished process, its output as text.
    Python writes its output when it ends, also if PYTHONUNBUFFERED is set for the tests."""
    env = {**os.environ, **(env or {})}
    env.pop('PYTHONUNBUFFERED', None)
    return subprocess.run(['bash', '-c', f'{before}\n"$@" {redirection}', 'bash', *map(str, command)],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def make_plugin_visible(folder):
    """Return an environment in which gevent finds our plugin, even if greenaio is only built in place."""
    if any(found.name == 'greenaio' for found in importlib.metadata.distributions()):
        return {}
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'setup.cfg')
    info = folder / 'greenaio-0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: greenaio\nVersion: 0\n')
    (info / 'entry_points.txt').write_text(''.join(
        f'[{group}]\n{entries}\n' for group, entries in settings['options.entry_points'].items()))
    path = filter(None, [str(folder), os.environ.get('PYTHONPATH')])
    return {'PYTHONPATH': os.pathsep.join(path)}


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
