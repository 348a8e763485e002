"""``python -m greenaio``: the command line."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

import gevent.monkey

from greenaio import __version__, bench, monkey


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, not the whole usage."""
        self.exit(2, f'{self.prog}: {message}\n')


def main() -> int:
    parser = _Parser(prog='python -m greenaio', description='Cooperative disk I/O for gevent.')
    parser.add_argument('--version', action='version', version=f'greenaio {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    bench_parser = commands.add_parser(
        'bench', help='measure a disk through greenaio and beside it', description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_arguments(bench_parser)
    run_parser = commands.add_parser(
        'run', help='run a script with gevent and greenaio patched in',
        usage='%(prog)s script.py|-m module args…')
    run_parser.add_argument('-m', dest='module', action='store_true', help='a module instead of a script')
    run_parser.add_argument('script')
    run_parser.add_argument('args', nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.command == 'run':
        return _run(arguments)
    try:
        return bench.main(arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    """What ``python script.py args…`` or ``python -m module args…`` does, patched."""
    gevent.monkey.patch_all(greenaio=False)
    monkey.patch_all()
    sys.argv = [arguments.script, *arguments.args]
    if arguments.module:
        runpy.run_module(arguments.script, run_name='__main__', alter_sys=True)
        return 0
    if not os.path.exists(arguments.script):
        print(f'python -m greenaio run: no such file: {arguments.script}', file=sys.stderr)
        return 2
    sys.path[0] = os.path.dirname(os.path.abspath(arguments.script))
    runpy.run_path(arguments.script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
