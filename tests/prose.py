"""Find English that is hard to read in comments, docstrings and documentation: ``python -m tests.prose``.

Some words are hard for readers whose first language is another, because they leave out the noun, or are
rare. Each pattern has advice, usually the words to write instead. ``tests/prose.txt`` holds how many
findings each file may have; a file that is not listed may have none. The status is 1 if a file has more.
After a change for the better, ``--update`` writes the new numbers down; it refuses if their sum would rise.
The aim is an empty list.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parent.parent
ALLOWED = ROOT / 'tests' / 'prose.txt'
SUFFIXES = ('.py', '.pyx', '.pxd', '.pyi')

PATTERNS = {
    r'(?i)\b(nobody|somebody|whoever|whatever)\b': 'name the noun: no greenlet, the caller, any file',
    r'(^|[.:;] )(What|Who)\b(?![^.]*\?)': 'begin with a noun: the request, the greenlet that',
    r'(?<=[:;,] )what (is|was|were|has|had)\b': 'name the noun: the bytes that, the answers that',
    r'\A(Which|How (many|much|often|long|large|fast))\b(?!.*---)': 'begin with a verb: Return the number of',
    r'\bwho\b': 'name the noun: the greenlet that, the caller that',
    r'\b(of|for|to|by|from|with|about|at|in|on) what\b': 'name the noun: of the bytes that',
    r'\bthat of\b|\bthose (of|that)\b': 'repeat the noun',
    r'(?i)\b(meanwhile|amidst|anew|whilst|thereby|hereby|lest)\b': 'write: during the call; again; so that',
    r'(?i)\bonce more\b': 'write: again',
    r'\bby way of\b': 'write: through',
    r'\bwhat is missing of\b': 'write: the rest of',
    r'(?i)\bas a rule\b': 'write: usually',
    r'\bin the place of\b': 'write: instead of',
    r'\bbut for\b': 'write: except for',
    r'\ball the same\b': 'write: still, even so',
    r', for (it|they|he)\b': 'write: because',
    r'\bhad better\b': 'write: should',
}


@dataclass
class Text:
    """A comment or docstring, or some lines of prose."""
    line: int
    text: str


def texts(path: pathlib.Path) -> Iterator[Text]:
    """The comments and docstrings of a file of Python, Cython or C inside it; all of another file."""
    source = path.read_text()
    if path.suffix not in SUFFIXES:
        for number, paragraph in paragraphs(source):
            yield Text(number, paragraph)
        return
    for match in re.finditer(r'"""(.*?)"""', source, re.DOTALL):
        if source[:match.start()].rstrip().endswith('extern from *:'):
            continue            # C
        yield Text(source.count('\n', 0, match.start()) + 1, match[1])
    code = re.sub(r'"""(.*?)"""', lambda match: '""' + '\n' * match[0].count('\n'), source, flags=re.DOTALL)
    comment: list[str] = []
    first = 0
    for number, line in enumerate([*code.split('\n'), ''], 1):
        found = re.search(r'(^|\s)#[ :](?P<text>.*)', line)
        if found is None or comment and line[:found.start()].strip():
            if comment:
                yield Text(first, '\n'.join(comment))
            comment = []
        if found is not None:
            first = first if comment else number
            comment.append(found['text'])
    for match in re.finditer(r'/\*(.*?)\*/', source, re.DOTALL):
        yield Text(source.count('\n', 0, match.start()) + 1, match[1])


def paragraphs(source: str) -> Iterator[tuple[int, str]]:
    """The prose of Markdown or reStructuredText: without code blocks and tables."""
    source = re.sub(r'^```.*?^```', lambda match: '\n' * match[0].count('\n'), source,
                    flags=re.DOTALL | re.MULTILINE)
    number = 1
    for part in re.split(r'(\n\s*\n)', source):
        if part.strip() and not part.lstrip().startswith(('|', '    ', '..')):
            yield number, part
        number += part.count('\n')


def findings(path: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """The line, the words and the advice of each match."""
    for text in texts(path):
        plain = re.sub(r'``.*?``|`.*?`', lambda match: 'CODE' + '\n' * match[0].count('\n'), text.text,
                       flags=re.DOTALL)
        for pattern, advice in PATTERNS.items():
            for match in re.finditer(pattern, plain, re.MULTILINE):
                yield text.line + plain.count('\n', 0, match.start()), match[0].strip('.:; '), advice


def files() -> list[pathlib.Path]:
    code = [path for suffix in SUFFIXES for path in ROOT.glob(f'greenaio/**/*{suffix}')]
    code += [*ROOT.glob('examples/*.py'), *ROOT.glob('tests/support/*.py')]
    return sorted([*code, *ROOT.glob('docs/*.md'), *ROOT.glob('*.md'), *ROOT.glob('*.rst')])


def allowed() -> dict[str, int]:
    lines = ALLOWED.read_text().splitlines() if ALLOWED.exists() else []
    return {name: int(count) for name, count in (line.split() for line in lines)}


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.prose', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=pathlib.Path, help='print all findings of these files')
    parser.add_argument('--update', action='store_true', help='write down how many there are now')
    arguments = parser.parse_args()
    for path in arguments.paths:
        for line, words, advice in findings(path):
            print(f'{path}:{line}: {words!r}: {advice}')
    if arguments.paths:
        return 0
    limits = allowed()
    counts = {str(path.relative_to(ROOT)): len(list(findings(path))) for path in files()}
    if arguments.update:
        if limits and sum(counts.values()) > sum(limits.values()):
            print(f'there are more findings than before: {sum(counts.values())}, not {sum(limits.values())}')
            return 1
        ALLOWED.write_text(''.join(f'{name} {count}\n' for name, count in counts.items() if count))
        return 0
    worse = [name for name, count in counts.items() if count > limits.get(name, 0)]
    for name in worse:
        print(f'{name} has {counts[name]} findings, not {limits.get(name, 0)}: python -m tests.prose {name}')
    return 1 if worse else 0


if __name__ == '__main__':
    sys.exit(main())
