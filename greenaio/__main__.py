"""``python -m greenaio``: the command line."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import json
import os
import runpy
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pkgutil import get_importer, read_code
from types import FrameType, ModuleType, TracebackType
from typing import Any

from greenaio import __version__, _config
from greenaio._commands import show as _show
from greenaio._commands.show import PROG, discard, tell

OUTPUT = 'standard output'

# The purpose of each. A command's arguments and imports come when that command is asked for.
COMMANDS = {
    'bench': 'measure a disk through greenaio and beside it',
    'config': 'print the settings, and where each came from',
    'doctor': 'tell which way each operation takes here, and why',
    'run': 'run a script with gevent and greenaio patched in',
}
CONFIG = """\
Print each setting of greenaio.config: its value, its unit, and whether that is the default or came from the
environment. A variable that is out of range ends this with status 2 and a line that names it; a variable
that greenaio does not know is named on standard error."""
RUN = """\
Do what ``python script.py args…`` or ``python -m module args…`` does, with gevent and greenaio patched in:
sockets and files wait in their greenlets."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, not the whole usage."""
        tell(self.prog, f'{message}; --help tells more')
        sys.exit(2)


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The paragraphs of a docstring, each as wide as the terminal."""
        return '\n\n'.join(textwrap.fill(' '.join(paragraph.replace('``', '').split()), width)
                           for paragraph in text.split('\n\n'))


_ended_by: list[int] = []       # signals


class _Output(io.FileIO):
    """Standard output, which its errors name: a command may fail elsewhere too."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            raise


def main() -> int:
    """Run the command that sys.argv names, and return its exit status: 0, 1 for a failure or a finding, 2 for
    a mistake of the user, 130 after Ctrl-C."""
    try:
        _config.check_environment(partial(tell, PROG))
    except ValueError as error:
        tell(PROG, error)
        return 2
    words = sys.argv[1:]
    asked = next((word for word in words if not word.startswith('-')), '')
    if asked == 'run' and not {'-h', '--help'}.intersection(_split_at_script(words)[0]):
        return _main(asked, words)      # its files and its output are the script's
    return without_traceback(f'{PROG} {asked}'.rstrip(), partial(_main, asked, words))


def without_traceback(prog: str, work: Callable[[], int]) -> int:
    """Return what *work* returns, or the exit status of how it failed: for Ctrl-C, for an error of the system
    and for output that nothing takes, *prog* and a line stand on standard error."""
    _open_standard_files()
    sys.unraisablehook = _end_again
    try:
        with _named_output():
            return work()
    except KeyboardInterrupt:
        tell(prog, 'interrupted')
        return 130
    except BrokenPipeError:             # ``head`` closes its pipe on purpose
        return 1                        # as rich does
    except OSError as error:
        tell(prog, f'{error.filename}: {error.strerror}' if error.filename and error.strerror else error)
        return 1
    except MemoryError:
        tell(prog, 'there is not enough memory')
        return 1
    except Exception:
        if signal.SIGINT not in _ended_by:
            raise
        tell(prog, 'interrupted')       # amid an import, where it comes out as another exception
        return 130


def _end_again(what: sys.UnraisableHookArgs) -> None:
    """Send the signal again, a millisecond later, if Python has swallowed its exception. It does so in a
    callback, such as the one that each import makes when it drops its lock."""
    if issubclass(what.exc_type, (KeyboardInterrupt, SystemExit)):
        signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(
            _ended_by[0] if _ended_by else signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.001)
    else:
        sys.__unraisablehook__(what)


def _open_standard_files() -> None:
    """Open /dev/null where a number from 0 to 2 is closed: a file of ours that got that number would be
    written to by C libraries, and by the children."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)    # which takes the lowest number
    if sys.stderr is None:              # number 2 may be of a file that was opened since
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), 'w')


@contextlib.contextmanager
def _named_output() -> Iterator[None]:
    """Until the end all that is printed goes through `_Output`, and all is written by then."""
    before = sys.stdout
    if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
        yield                           # it is closed, or captured by the program that calls us
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(before.fileno(), 'w', closefd=False)), before.encoding,
        'backslashreplace', line_buffering=before.line_buffering)       # a path may be no text
    try:
        yield
        sys.stdout.flush()
    except SystemExit:                  # after --help
        sys.stdout.flush()
        raise
    except OSError as error:
        if error.filename == OUTPUT:
            discard(sys.stdout.fileno())
        raise
    finally:
        sys.stdout = before


def _main(asked: str, words: list[str]) -> int:
    parser = _Parser(prog=PROG, description='Cooperative disk I/O for gevent.')
    parser.add_argument('--version', action='version', version=f'greenaio {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    if asked and asked not in COMMANDS:
        near = get_close_matches(asked, COMMANDS, 1)
        parser.error(f'there is no command {asked!r}' + (f', did you mean {near[0]}?' if near else ''))
    by_name = {name: commands.add_parser(name, help=summary, formatter_class=_Help)
               for name, summary in COMMANDS.items()}
    if asked:
        _add_arguments(asked, by_name[asked])
    of_script: list[str] = []
    if asked == 'run':
        words, of_script = _split_at_script(words)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        (by_name[asked] if asked else parser).error(f'there is no {" ".join(unknown)}')
    if not asked:
        parser.error(f'a command is missing, one of {", ".join(COMMANDS)}')
    if asked == 'run':
        return _run(arguments.script, of_script, is_module=arguments.module)
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'Closed', OUTPUT)
    if asked == 'config':
        return _print_config(arguments)
    end_on_signals()
    code: int = import_module(f'greenaio._commands.{asked}').main(arguments)
    return code


def end_on_signals() -> None:
    """Have Ctrl-C, `kill` and a terminal that goes away end this greenlet, so that it removes what it made.

    Python would raise KeyboardInterrupt in any greenlet. gevent prints a traceback of that greenlet, and in a
    callback of C code the exception is lost."""
    import gevent

    main = gevent.getcurrent()

    def end(number: int, frame: FrameType | None) -> None:
        _ended_by.append(number)
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if gevent.getcurrent() is main:
            raise error
        gevent.kill(main, error)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:      # as nohup makes it
            signal.signal(number, end)


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    if name == 'run':
        parser.usage = '%(prog)s script.py|-m module args…'
        parser.description = RUN
        parser.add_argument('-m', dest='module', action='store_true', help='a module instead of a script')
        parser.add_argument('script', help='its path, or the name of the module')
        parser.add_argument('args', nargs='*', default=[], help='what it finds in sys.argv')
    elif name == 'config':
        parser.description = CONFIG
        parser.add_argument('--json', action='store_true', help='for machines')
    else:
        module = import_module(f'greenaio._commands.{name}')
        parser.description = module.__doc__
        module.add_arguments(parser)


def _print_config(arguments: argparse.Namespace) -> int:
    config = _config.config
    if arguments.json:
        print(json.dumps([{
            'name': one.name, 'variable': one.variable, 'value': getattr(config, one.name),
            'default': one.default, 'unit': one.unit, 'from': one.allowed[0], 'to': one.allowed[-1],
            'source': config.source(one.name), 'description': one.summary,
        } for one in _config.SETTINGS], indent=1))
        return 0
    rows = [(one.name, str(getattr(config, one.name)), one.unit, config.source(one.name), str(one.default),
             f'{one.allowed[0]} to {one.allowed[-1]}') for one in _config.SETTINGS]
    rows += [(name, os.environ.get(name, ''), '', name if name in os.environ else _config.DEFAULT, '', '')
             for name in _config.OTHER_VARIABLES]
    _show.table(('setting', 'value', 'unit', 'came from', 'default', 'allowed'), rows,
                right=('value', 'default'))
    for one in _config.SETTINGS:
        print('\n' + _show.wrapped(f'{one.name} ({one.variable}): {one.summary}'))
    for name, description in _config.OTHER_VARIABLES.items():
        print('\n' + _show.wrapped(f'{name}: {description[0].upper()}{description[1:]}.'))
    return 0


def _split_at_script(words: list[str]) -> tuple[list[str], list[str]]:
    """Up to the name of the script, and what is its own: argparse would take a ``--`` out of that."""
    command = words.index('run')
    last = next((i for i in range(command + 1, len(words))
                 if not words[i].startswith('-') or words[i - 1] == '--'), len(words))
    return words[:last + 1], words[last + 1:]


def _run(script: str, args: list[str], *, is_module: bool) -> int:
    """Do as ``python script.py args…`` or ``python -m module args…`` does, patched."""
    import gevent.monkey

    from greenaio import monkey

    gevent.monkey.patch_all(greenaio=False)
    monkey.patch_all()
    sys.argv = [script, *args]
    if not (_is_there(script) if is_module else os.path.exists(script)):
        tell(f'{PROG} run', f'{"there is no module" if is_module else "no such file:"} {script}')
        return 2
    sys.excepthook = _show_without_us
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:       # see greenaio/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not run_module and run_path of runpy: when they end they put the old __main__ back, and the threads and
    # the exit functions of a script outlive it.
    main = sys.modules['__main__'] = ModuleType('__main__')
    vars(main)['__builtins__'] = builtins
    if is_module:
        _run_as_python_does(script)
    elif get_importer(script) is not None:      # a folder or a zip file
        sys.path[0] = os.path.abspath(script)
        _run_as_python_does('__main__', alter_argv=False)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
        path = os.path.join(os.getcwd(), script)    # not abspath(), which takes link/.. for nothing
        try:
            with io.open_code(path) as file:
                source = file.read()
        except OSError as error:
            tell(f'{PROG} run', f'{script}: {error.strerror}')
            return 2
        _run_source(source, path, vars(main))
    return 0


def _show_without_us(kind: type[BaseException], error: BaseException,
                     traceback: TracebackType | None) -> None:
    """Print the traceback of a script as Python would, which knows no frames of this module below it."""
    rest, place = traceback, traceback
    while place:
        if place.tb_frame.f_code.co_filename == __file__:
            rest = place.tb_next
        place = place.tb_next
    sys.__excepthook__(kind, error.with_traceback(rest), rest)


def _run_as_python_does(module: str, *, alter_argv: bool = True) -> None:
    """By what the interpreter itself calls, in the namespace of ``__main__`` as it is."""
    runpy._run_module_as_main(module, alter_argv)       # type: ignore[attr-defined]


def _run_source(source: bytes, path: str, namespace: dict[str, Any]) -> None:
    code = read_code(io.BytesIO(source))        # of a .pyc, else None
    if code is None:
        code = compile(source, path, 'exec', dont_inherit=True)     # or it has the annotations of this module
    namespace.update(__file__=path, __cached__=None)
    exec(code, namespace)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as error:        # of a package of it, or it imports what is not there
        if not f'{module}.'.startswith(f'{error.name}.'):
            raise
        return False


if __name__ == '__main__':
    sys.exit(main())
