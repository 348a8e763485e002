"""Tables for a terminal: by rich where that is installed, else in plain text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Sequence

WIDTH = 120         # columns, where there is no terminal to ask
PROSE = 110         # columns that text takes at most
LEAST = 24          # columns that the last one gets, however narrow the terminal


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = '',
          right: Collection[str] = ()) -> None:
    """Print *rows* under the names of *columns*; those named in *right* are set to the right. The last column
    takes more than one line where it must. Where no column has a name there is no line of them."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(columns, rows, title, right)
        return
    shown = Table(title=Text(title) if title else None, title_justify='left', show_header=any(columns))
    for i, name in enumerate(columns):
        shown.add_column(name, justify='right' if name in right else 'left', no_wrap=i < len(columns) - 1)
    for row in rows:
        shown.add_row(*map(Text, row))      # as it is: a path may have brackets
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(shown)


def wrapped(text: str, hang: str = '   ') -> str:
    """*text*, in lines for this terminal; *hang* begins all but the first. No word is broken."""
    width = min(PROSE, shutil.get_terminal_size((WIDTH, 0)).columns)
    return '\n'.join(textwrap.wrap(text, width, subsequent_indent=hang, break_long_words=False,
                                   break_on_hyphens=False))


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Collection[str]) -> None:
    if title:
        print(title)
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    rest = max(LEAST, shutil.get_terminal_size((WIDTH, 0)).columns - sum(widths[:-1]) - 2 * len(widths) + 2)
    widths[-1] = min(widths[-1], rest)
    for row in (columns, *rows) if any(columns) else rows:
        first, *more = textwrap.wrap(row[-1], rest) or ['']
        cells = [text.rjust(width) if name in right else text.ljust(width)
                 for name, text, width in zip(columns, (*row[:-1], first), widths)]
        print('  '.join(cells).rstrip())
        for line in more:
            print(' ' * (sum(widths[:-1]) + 2 * len(widths) - 2) + line)
