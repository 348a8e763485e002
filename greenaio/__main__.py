"""``python -m greenaio``: the command line."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import runpy
import signal
import sys
import textwrap
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pkgutil import get_importer, read_code
from types import ModuleType
from typing import Any

from greenaio import __version__, _config

# What each is for. A command's arguments, and all that it imports, come when it is the one that is asked for.
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
        self.exit(2, f'{self.prog}: {message}; --help tells more\n')


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The paragraphs of a docstring, each as wide as the terminal."""
        return '\n\n'.join(textwrap.fill(' '.join(paragraph.replace('``', '').split()), width)
                           for paragraph in text.split('\n\n'))


def main() -> int:
    def tell(problem: object) -> None:
        print(f'python -m greenaio: {problem}', file=sys.stderr)

    try:
        _config.check_environment(tell)
    except ValueError as error:
        tell(error)
        return 2
    asked = next((word for word in sys.argv[1:] if not word.startswith('-')), '')
    if asked == 'run':                      # Ctrl-C is the script's
        return _main(asked)
    sys.unraisablehook = _raise_again
    try:
        return _main(asked)
    except KeyboardInterrupt:
        print(f'python -m greenaio {asked}'.strip() + ': interrupted', file=sys.stderr)
        return 130


def _raise_again(what: sys.UnraisableHookArgs) -> None:
    """Raise Ctrl-C again a millisecond later, where Python has swallowed it. Python does so in a callback,
    such as the one that each import makes when it drops its lock."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
    else:
        sys.__unraisablehook__(what)


def _main(asked: str) -> int:
    parser = _Parser(prog='python -m greenaio', description='Cooperative disk I/O for gevent.')
    parser.add_argument('--version', action='version', version=f'greenaio {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    words = sys.argv[1:]
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
    if arguments.command == 'run':
        return _run(arguments.script, of_script, is_module=arguments.module)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')       # a path may be no text
    try:
        code: int = (_print_config(arguments) if arguments.command == 'config' else
                     import_module(f'greenaio.{arguments.command}').main(arguments))
        sys.stdout.flush()
        return code
    except OSError as error:
        if error.filename is not None:
            raise
        # Standard output takes nothing: drop the rest of it, or Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):      # ``head`` closes its pipe on purpose
            print(f'{by_name[asked].prog}: standard output: {error.strerror}', file=sys.stderr)
        return 1                        # as rich does


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
        module = import_module(f'greenaio.{name}')
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
    from greenaio import _show

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
    """What ``python script.py args…`` or ``python -m module args…`` does, patched."""
    import gevent.monkey

    from greenaio import monkey

    gevent.monkey.patch_all(greenaio=False)
    monkey.patch_all()
    sys.argv = [script, *args]
    if not (_is_there(script) if is_module else os.path.exists(script)):
        print(f'python -m greenaio run: {"there is no module" if is_module else "no such file:"} {script}',
              file=sys.stderr)
        return 2
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
        _run_file(script, vars(main))
    return 0


def _run_as_python_does(module: str, *, alter_argv: bool = True) -> None:
    """By what the interpreter itself calls, in the namespace of ``__main__`` as it is."""
    runpy._run_module_as_main(module, alter_argv)       # type: ignore[attr-defined]


def _run_file(path: str, namespace: dict[str, Any]) -> None:
    if not os.path.isabs(path):
        path = os.path.join(os.getcwd(), path)      # not abspath(), which takes link/.. for nothing
    with io.open_code(path) as file:
        source = file.read()
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
