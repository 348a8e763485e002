"""Read mutants, and apply them to the sources.

A mutant is a text file, ``NAME.mutant``, which breaks one promise of the code::

    The eventfd is cleared after the ring was looked at, so a completion between them wakes no greenlet.
    Tests: tests/faults/test_sim.py tests/test_hub.py

    @ Parking._on_eventfd
    -self.engine.context.clear()

    @ Parking._on_eventfd
         if greenlet_current() is self.hub:
             self._drain()
    +        self.engine.context.clear()

First stands the promise that is broken, then the tests of which at least one must fail, then the edits.

A line with ``@`` names the place of an edit: a function (``Class.method``, ``function``), a file
(``greenaio/_core/hub.pyx``), or both, with a space between them, if two files have a function of that name.
Lines with ``-`` are removed, lines with ``+`` are added, lines with a space stay. Removed and staying
lines are the anchor: the place must have them exactly once, one after the other. Keep the anchor short;
one line is enough for most.

An anchor does not depend on line numbers, indentation, comments, blank lines, or the other lines of its
function.
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

PYTHON = re.compile(r'(?:cdef )?class (?P<class>\w+)'
                    r'|(?:cdef|cpdef|(?:async )?def) [^=(]*?(?P<function>\w+)\(')
C = re.compile(r'static [^=;(]*?(?P<function>\w+)\(')


class Misfit(Exception):
    """An edit of a mutant has no place in the sources, or several."""


@dataclass
class Block:
    """A function: its lines are those of *path* from *first* up to *end*, which is not one of them."""
    path: str
    name: str
    first: int
    end: int


class Sources:
    """The sources of the package, as lines without their ends by path."""

    def __init__(self, root: pathlib.Path = ROOT):
        paths = [path for suffix in ('py', 'pyx', 'pxd') for path in root.glob(f'greenaio/**/*.{suffix}')]
        self.lines = {str(path.relative_to(root)): path.read_text().split('\n') for path in sorted(paths)}

    def copy(self) -> Sources:
        other = Sources.__new__(Sources)
        other.lines = {path: list(lines) for path, lines in self.lines.items()}
        return other

    def blocks(self, place: str) -> list[Block]:
        """Return the blocks that *place* names: a file, a function, or a function of a file."""
        path, _, name = place.rpartition(' ') if ' ' in place or '/' not in place else (place, '', '')
        if path and path not in self.lines:
            raise Misfit(f'there is no {path}')
        paths = [path] if path else list(self.lines)
        if not name:
            return [Block(path, '', 0, len(self.lines[path]))]
        found = [block for path in paths for block in functions(path, self.lines[path]) if block.name == name]
        if not found:
            raise Misfit(f'there is no {place}')
        return found


def functions(path: str, lines: list[str]) -> list[Block]:
    """Return the functions and classes of a file, those of C too, by their indentation."""
    found: list[Block] = []
    open_blocks: list[tuple[int, Block]] = []
    for number, line in enumerate(lines):
        code = line.lstrip()
        if not code or is_comment(code) or code.startswith(('{', ')')):
            continue
        indent = len(line) - len(code)
        while open_blocks and open_blocks[-1][0] >= indent:
            open_blocks.pop()[1].end = number
        if match := PYTHON.match(code) or C.match(code):
            name = '.'.join([*(block.name for _, block in open_blocks[-1:]), match[match.lastgroup or 0]])
            block = Block(path, name, number, len(lines))
            found.append(block)
            open_blocks.append((indent, block))
    return found


def is_comment(code: str) -> bool:
    return code.startswith(('# ', '#:', '/*')) and not re.search(r'\*/.*\S', code) or code == '#'


def normal(line: str) -> str:
    """Return the code of *line* without indentation, runs of spaces, and the comment at its end."""
    line = re.sub(r'\s+#(?: .*)?$|\s*/\*(?:(?!\*/).)*\*/\s*$', '', line)
    return ' '.join(line.split())


@dataclass
class Edit:
    place: str
    lines: list[tuple[str, str]]        # the mark, which is '-', '+' or ' ', and the code behind it

    def apply(self, sources: Sources) -> None:
        path, numbers = self.find(sources)
        lines = sources.lines[path]
        anchor = iter(numbers)
        shift = indentation(lines[numbers[0]]) - indentation(self.anchor[0])
        changed, at = [], numbers[0]
        for mark, code in self.lines:
            if mark == '+':
                changed.append(' ' * (indentation(code) + shift) + code.lstrip())
                continue
            number = next(anchor)
            changed += lines[at:number]
            if mark == ' ':
                changed.append(lines[number])
            at = number + 1
        lines[numbers[0]:numbers[-1] + 1] = changed

    def find(self, sources: Sources) -> tuple[str, list[int]]:
        """Return the path and the numbers of the lines that the anchor matches; raise `Misfit` if it matches
        none or several."""
        places = []
        for block in sources.blocks(self.place):
            lines = sources.lines[block.path]
            code = [(number, normal(lines[number])) for number in range(block.first, block.end)
                    if lines[number].strip() and not is_comment(lines[number].strip())]
            wanted = [normal(line) for line in self.anchor]
            for start in range(len(code) - len(wanted) + 1):
                part = code[start:start + len(wanted)]
                if [text for _, text in part] == wanted:
                    places.append((block.path, [number for number, _ in part]))
        if len(places) != 1:
            raise Misfit(f'{self.place} has {len(places)} places like {self.anchor[0].strip()!r}, not one')
        return places[0]

    @property
    def anchor(self) -> list[str]:
        return [code for mark, code in self.lines if mark != '+']


@dataclass
class Mutant:
    name: str
    promise: str
    tests: list[str]
    edits: list[Edit]

    @classmethod
    def read(cls, name: str) -> Mutant:
        return cls.parse(name, (HERE / f'{name}.mutant').read_text())

    @classmethod
    def parse(cls, name: str, text: str) -> Mutant:
        head, *parts = re.split(r'^@ ', text, flags=re.MULTILINE)
        promise, _, tests = head.partition('\nTests: ')
        edits = []
        for part in parts:
            place, *lines = part.rstrip().split('\n')
            edits.append(Edit(place.strip(), [(line[0], line[1:]) for line in lines]))
            if not edits[-1].anchor or {mark for mark, _ in edits[-1].lines} - set('-+ '):
                raise ValueError(f'{name}: bad edit of {place}')
        if not promise or not tests.split() or not edits:
            raise ValueError(f'{name}: a mutant has a promise, tests and edits')
        return cls(name, promise, tests.split(), edits)

    def apply(self, sources: Sources) -> None:
        for edit in self.edits:
            edit.apply(sources)

    def write(self, folder: pathlib.Path) -> None:
        """Make the edits in the project in *folder*."""
        before, after = Sources(folder), Sources(folder)
        self.apply(after)
        for path, lines in after.lines.items():
            if lines != before.lines[path]:
                (folder / path).write_text('\n'.join(lines))

    def misfit(self, sources: Sources) -> str:
        """Return why the mutant does not fit the code, or an empty string."""
        try:
            self.apply(sources.copy())
        except Misfit as error:
            return str(error)
        lost = [test for test in self.tests if not (ROOT / test.partition('::')[0]).exists()]
        return f'there is no {lost[0]}' if lost else ''


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob('*.mutant'))
