"""``python -m greenaio``: the command line."""

from __future__ import annotations

import argparse
import sys

from greenaio import __version__, bench


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
    arguments = parser.parse_args()
    try:
        return bench.main(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
