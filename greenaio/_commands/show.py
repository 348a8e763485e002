"""Lines of problems, and tables for a terminal: by rich where that is installed, else in plain text.

No cell is ever cut. A table that is too wide for the terminal loses its frame, then the spaces between its
columns; one that is still too wide becomes a list, with a line for each cell.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from itertools import zip_longest

PROG = 'python -m greenaio'
WIDTH = 120         # columns, where there is no terminal to ask
PROSE = 110         # columns that text takes at most
LEAST = 24          # columns that the last one gets, however narrow the terminal
FRAME = 3           # columns that a frame takes of each column, and one more

Rows = Sequence[Sequence[str]]


def tell(prog: str, problem: object) -> None:
    """Print a line on standard error, where it takes one."""
    if sys.stderr is None:              # print() would use standard output
        return
    try:
        print(f'{prog}: {problem}', file=sys.stderr)
    except OSError:
        discard(sys.stderr.fileno())


def discard(fd: int) -> None:
    """Lead *fd* to nowhere: Python writes at its end what could not be written before, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def table(columns: Sequence[str], rows: Rows, *, title: str = '', right: Collection[str] = ()) -> None:
    """Print *rows* under the names of *columns*; those named in *right* are set to the right. The last column
    takes more than one line where it must. Where no column has a name there is no line of them."""
    room = _columns_of_terminal()
    for heads in ([[name] for name in columns], _folded(columns, rows)):
        least = sum(_widths(columns, heads, rows, right))
        if least + FRAME * len(columns) < room and importlib.util.find_spec('rich') is not None:
            _framed(columns, heads, rows, title, right, room)
            return
    for heads, gap in (([[name] for name in columns], 2), (_folded(columns, rows), 1)):
        widths = _widths(columns, heads, rows, right)
        if sum(widths) + gap * (len(columns) - 1) <= room:
            _plain(columns, heads, rows, title, right, widths, gap, room)
            return
    _list(columns, rows, title)


def wrapped(text: str, hang: str = '   ') -> str:
    """*text*, in lines for this terminal; *hang* begins all but the first. No word is broken."""
    return '\n'.join(textwrap.wrap(text, min(PROSE, _columns_of_terminal()), subsequent_indent=hang,
                                   break_long_words=False, break_on_hyphens=False))


def _columns_of_terminal() -> int:
    return shutil.get_terminal_size((WIDTH, 0)).columns


def _folded(columns: Sequence[str], rows: Rows) -> list[list[str]]:
    """The lines of each name, which is as narrow as its column if its words are."""
    return [textwrap.wrap(name, max(map(len, (*cells, *name.split()))), break_on_hyphens=False)
            if name else [''] for name, cells in zip(columns, zip(*rows))]


def _widths(columns: Sequence[str], heads: list[list[str]], rows: Rows, right: Collection[str]) -> list[int]:
    """How much each column needs at least."""
    widths = [max(map(len, (*lines, *cells))) for lines, cells in zip(heads, zip(*rows))]
    if columns[-1] not in right:
        widths[-1] = max(min(widths[-1], LEAST), *map(len, heads[-1]), 0)
    return widths


def _framed(columns: Sequence[str], heads: list[list[str]], rows: Rows, title: str, right: Collection[str],
            room: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title) if title else None, title_justify='left', show_header=any(columns))
    for i, name in enumerate(columns):
        shown.add_column('\n'.join(heads[i]), justify='right' if name in right else 'left',
                         no_wrap=i < len(columns) - 1)
    for row in rows:
        shown.add_row(*map(Text, row))      # as it is: a path may have brackets
    Console(width=room).print(shown)


def _plain(columns: Sequence[str], heads: list[list[str]], rows: Rows, title: str, right: Collection[str],
           widths: list[int], gap: int, room: int) -> None:
    if title:
        print(title)
    *others, _ = widths
    rest = room - sum(others) - gap * len(others)
    for cells in zip_longest(*heads, fillvalue='') if any(columns) else ():
        _print_row(columns, cells, right, widths, gap)
    for *most, last in rows:
        lines = textwrap.wrap(last, rest, break_on_hyphens=False) or ['']
        for cells in zip_longest(*([cell] for cell in most), lines, fillvalue=''):
            _print_row(columns, cells, right, widths, gap)


def _print_row(columns: Sequence[str], cells: Sequence[str], right: Collection[str], widths: list[int],
               gap: int) -> None:
    print((gap * ' ').join(cell.rjust(width) if name in right else cell.ljust(width)
                           for name, cell, width in zip(columns, cells, widths)).rstrip())


def _list(columns: Sequence[str], rows: Rows, title: str) -> None:
    if title:
        print(wrapped(title))
    for first, *others in rows:
        if any(columns):
            print(wrapped(first))
        for name, cell in zip(columns[1:], others):
            print(wrapped(f'   {name}: {cell}' if any(columns) else f'{first}: {cell}', 6 * ' '))
