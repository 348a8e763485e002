"""Measure the structure of the package: ``python -m tests.house [CHECKOUT ...]``.

Prints a row for each figure that a maintainer feels: how long the files and functions of the core are, how
large its classes, how much of the code is explained, and where. With several checkouts, such as worktrees of
an old and a new commit, there is a column for each. A checkout from before the folders counts all modules
with an underscore, `alignment`, `streams` and `fileobject` as the core.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.mutants.edits import functions

ROOT = pathlib.Path(__file__).parent.parent
LONG_FILE = 400                 # lines
SUFFIXES = ('.py', '.pyx', '.pxd')
CORE = ('_core', '_files')
FLAT_CORE = re.compile(r'_[a-z]|alignment|streams|fileobject')

FIELD = re.compile(r'    cdef (?:public |readonly )?(?!class|inline)[^(=]+$')
SELF = re.compile(r'^\s+self\.(\w+)(?:, self\.(\w+))*(?:: [^=]+)? = ', re.M)
CLASS = re.compile(r'\s*(?:cdef )?class ')


@dataclass
class Source:
    """One file: its lines, divided into code, comments and docstrings."""
    path: pathlib.Path
    lines: list[str]
    code: list[str] = field(default_factory=list)
    own_line: list[str] = field(default_factory=list)           # comments that have a line of their own
    end_of_line: list[str] = field(default_factory=list)

    def divide(self) -> Source:
        text = re.sub(r'"""(.*?)"""', lambda match: '\n' * match[0].count('\n'), '\n'.join(self.lines),
                      flags=re.DOTALL)
        for line in text.split('\n'):
            code, _, comment = line.partition('#') if re.search(r'(^|\s)#[ :]', line) else (line, '', '')
            if code.strip():
                self.code.append(code)
            if comment:
                (self.end_of_line if code.strip() else self.own_line).append(comment)
        return self


def sources(root: pathlib.Path) -> list[Source]:
    return [Source(path, path.read_text().split('\n')).divide()
            for path in sorted((root / 'greenaio').rglob('*')) if path.suffix in SUFFIXES]


def is_core(root: pathlib.Path, path: pathlib.Path) -> bool:
    folder, *rest = path.relative_to(root / 'greenaio').parts
    if (root / 'greenaio' / '_core').is_dir():
        return bool(rest) and folder in CORE
    return bool(FLAT_CORE.match(path.stem))


def lengths(all_sources: list[Source]) -> Iterator[tuple[int, str]]:
    """The length of each function, in lines, and its name."""
    for source in all_sources:
        for block in functions(source.path.name, source.lines):
            if not CLASS.match(source.lines[block.first]):
                last = block.end
                while not source.lines[last - 1].strip():
                    last -= 1
                yield last - block.first, f'{source.path.stem}.{block.name}'


def classes(all_sources: list[Source]) -> Iterator[tuple[int, int, str]]:
    """The numbers of fields and methods of each class, and its name. Cython declares fields in the .pxd."""
    fields: dict[tuple[str, str], set[str]] = {}
    methods: dict[tuple[str, str], set[str]] = {}
    for source in all_sources:
        for block in functions(source.path.name, source.lines):
            lines = source.lines[block.first:block.end]
            if not CLASS.match(lines[0]):
                continue
            key = source.path.stem, block.name
            found = fields.setdefault(key, set())
            for line in lines:
                if FIELD.match(line):
                    found.update(re.findall(r'(\w+)\s*(?:\[\w+\])?\s*(?:,|$|#)', line.partition('#')[0]))
            found.update(name for match in SELF.findall('\n'.join(lines)) for name in match if name)
            methods.setdefault(key, set()).update(
                other.name for other in functions(source.path.name, source.lines)
                if other.name.startswith(f'{block.name}.') and block.first < other.first < block.end)
    for key, found in fields.items():
        yield len(found), len(methods[key]), '.'.join(key)


def words(comments: list[str]) -> int:
    return sum(len(comment.split()) for comment in comments)


def measure(root: pathlib.Path) -> dict[str, str]:
    """Return the figures of the checkout *root*, as text by name."""
    everything = sources(root)
    core = [source for source in everything if is_core(root, source.path)]
    deep = [source for source in core if source.path.parent.name != '_files']
    long_files = [source for source in core if len(source.lines) - 1 > LONG_FILE]
    lines, longest = max(lengths(core))
    by_fields, by_methods = max(classes(core)), max(classes(core), key=lambda one: one[1])
    end_of_line, own_line = (words([comment for source in core for comment in getattr(source, name)])
                             for name in ('end_of_line', 'own_line'))
    code = sum(len(source.code) for source in deep)
    comments = sum(len(source.own_line) + len(source.end_of_line) for source in deep)
    return {
        f'files over {LONG_FILE} lines': f'{len(long_files)} of {len(core)}',
        'longest function, lines': f'{lines} ({longest})',
        'median function, lines': f'{statistics.median(length for length, _ in lengths(core)):.0f}',
        'most fields of a class': f'{by_fields[0]} ({by_fields[2]})',
        'most methods of a class': f'{by_methods[1]} ({by_methods[2]})',
        'code lines of the package': str(sum(len(source.code) for source in everything)),
        'comments per code line': f'{comments / code:.2f}',
        'comment words at the end of code lines': f'{end_of_line / (end_of_line + own_line):.0%}',
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m tests.house', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkouts', nargs='*', type=pathlib.Path, default=[ROOT], metavar='CHECKOUT')
    roots = [path.resolve() for path in parser.parse_args().checkouts]
    columns = [measure(root) for root in roots]
    for row in [('of the core', *(root.name for root in roots)), ('---', *('---' for _ in roots)),
                *((name, *(column[name] for column in columns)) for name in columns[0])]:
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
    main()
