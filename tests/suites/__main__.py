"""Do the suites of other projects pass as they do with gevent alone? ``python -m tests.suites [NAME ...]``:
each gets an environment, and runs with ``gevent.monkey.patch_all()`` alone and with greenaio's patch on top.
Prints the counts, and each test with another outcome. Ends with 1 if one of these has no reason in its row.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

from tests.suites import cpython, gevents, projects
from tests.suites.frame import Place, Row, Suite, build_wheel, compare

SUITES = {**cpython.SUITES, **gevents.SUITES, **projects.SUITES}


HEADER = f'{"suite":12}{"loop":12}{"mode":12}{"tests":>8}{"failed":>8}{"skipped":>8}{"differ":>8}'


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.suites', description=__doc__)
    parser.add_argument('names', nargs='*', metavar='NAME', default=[*SUITES],
                        help=f'all, unless some are named: {", ".join(SUITES)}')
    parser.add_argument('--parts', metavar='PART,...', help='only these parts, such as test__os of gevent')
    parser.add_argument('--keep', metavar='FOLDER', type=pathlib.Path,
                        help='keep environments and results there, and use them again')
    arguments = parser.parse_args()
    parts = arguments.parts.split(',') if arguments.parts else []
    for name in arguments.names:
        check(parser, name, parts)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return run(arguments.names, parts, arguments.keep.resolve())
    with tempfile.TemporaryDirectory(prefix='greenaio-suites-') as folder:
        return run(arguments.names, parts, pathlib.Path(folder))


def check(parser: argparse.ArgumentParser, name: str, parts: list[str]) -> None:
    if name not in SUITES:
        parser.error(f'there is no suite {name}: {", ".join(SUITES)}')
    if unknown := set(parts) - set(SUITES[name].parts):
        parser.error(f'{name} has no {", ".join(sorted(unknown))}: {", ".join(SUITES[name].parts)}')
    for command, package in SUITES[name].commands.items():
        if not shutil.which(command):
            parser.error(f'{name} needs {command} (apt install {package})')


def run(names: list[str], parts: list[str], folder: pathlib.Path) -> int:
    wheel = build_wheel(folder)
    print(HEADER, flush=True)
    faults = 0
    for name in names:
        suite: Suite = SUITES[name]
        place = Place(suite, folder / name)
        try:
            place.prepare(wheel)
            for row in compare(place, parts or [*suite.parts]):
                faults += report(name, row)
        except subprocess.CalledProcessError as error:      # the others still run
            print(f'{name}: {error}', flush=True)
            faults += 1
    print(f'{faults} faults')
    return 1 if faults else 0


def report(name: str, row: Row) -> int:
    """Print a row; return how many of its differences have no reason."""
    counts = ''.join(f'{row.counts[key]:8}' for key in ('tests', 'failed', 'skipped'))
    print(f'{name:12}{row.loop:12}{row.mode:12}{counts}{len(row.differences):8}', flush=True)
    for difference in row.differences:
        print(f'    {difference}', flush=True)
    return sum(not difference.reason for difference in row.differences)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
