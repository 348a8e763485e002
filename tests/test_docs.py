"""Every code block of README.md and docs/*.md runs, in order, as a reader would run it; and the names exist.

``python`` blocks of a page share one interpreter, in a folder of the page's own on a disk; one that begins
with ``# name.py`` is saved there. ``sh`` blocks run command by command: see `COMMANDS` for what is not run as
it stands. A ``text`` block is what the block just before it prints, with … for anything; ``none``, a drawing.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest

import greenaio
import greenaio.os
from greenaio._config import Config
from tests.support import missing
from tests.support.processes import make_plugin_visible

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(r'^([ \t>]*)(```+|~~~+)[ \t]*(\S*)[^\n]*\n(.*?)^\1\2[ \t]*$', re.M | re.S)
# Sphinx reads those in braces.
LANGUAGES = {'python', 'sh', 'text', 'none', '{toctree}', '{eval-rst}'}
PATIENCE = 30                   # seconds, for one block

APP = '''
def app(environ, start_response):
    start_response('200 OK', [])
    return [b'here']
'''
# What a page takes for granted.
PREPARED = {
    'README.md': {'image': os.urandom(4 << 20), 'script.py': b'print("ran")', 'app.py': APP.encode()},
    'troubleshooting.md': {'script.py': b'print("ran")'},
}


@dataclass
class Block:
    language: str
    text: str
    line: int
    is_next: bool               # nothing but blank lines between it and the block before


def blocks(page):
    text, end, found = page.read_text(), -1, []
    for fence in FENCE.finditer(text):
        found.append(Block(fence[3], fence[4], text.count('\n', 0, fence.start(4)),
                           end >= 0 and not text[end:fence.start()].strip()))
        end = fence.end()
    return found


def test_no_block_is_overlooked():
    """The pattern finds as many as there are fences that begin one, and each is of a language known here."""
    for page in PAGES:
        fences = re.findall(r'^[ \t>]*(?:```|~~~)', page.read_text(), re.M)
        assert len(fences) == 2 * len(blocks(page)), page.name
        for block in blocks(page):
            assert block.language in LANGUAGES, f'{page.name}:{block.line}'


# A page ------------------------------------------------------------------------------------------

INTERPRETER = '''
import json, sys
names = {'__name__': '__main__'}
for order in sys.stdin:
    page, line, source = json.loads(order)
    exec(compile('\\n' * line + source, page, 'exec'), names)
    print(end='\\0', flush=True)
'''


class Reader:
    """Who goes through a page in *folder*, and does what it says."""

    def __init__(self, page, folder, environment):
        self.page, self.folder, self.environment = page, folder, environment
        self.server = self.interpreter = None
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            self.address = f'127.0.0.1:{probe.getsockname()[1]}'
        self.errors = folder / '.stderr'

    def close(self):
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(15) == 0, 'the server'
        if self.interpreter is not None:
            self.interpreter.stdin.close()
            assert self.interpreter.wait(PATIENCE) == 0, self.told()
            self.interpreter.stdout.close()
            assert self.told() == ''

    def told(self):
        return self.errors.read_text()

    def python(self, block):
        named = re.match(r'# (\w+\.py)\n', block.text)
        if named:
            (self.folder / named[1]).write_text(block.text)
            rest = ''.join(other.text for other in blocks(self.page) if other.language == 'sh')
            assert re.search(rf'\b{named[1].removesuffix(".py")}(\.py\b|:)', rest), f'nothing uses {named[1]}'
            return ''
        if self.interpreter is None:
            with self.errors.open('w') as errors:
                self.interpreter = subprocess.Popen(
                    [sys.executable, '-X', 'dev', '-W', 'error', '-c', INTERPRETER], text=True, stderr=errors,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.folder, env=self.environment)
        print(json.dumps([str(self.page), block.line, block.text]), file=self.interpreter.stdin, flush=True)
        printed = ''
        timer = threading.Timer(PATIENCE, self.interpreter.kill)
        timer.start()
        while not printed.endswith('\0'):
            printed += (more := self.interpreter.stdout.read(1))
            assert more, self.told()
        timer.cancel()
        return printed[:-1]

    def sh(self, block):
        printed = ''
        text = block.text.replace('\\\n', ' ').replace('127.0.0.1:8000', self.address)
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index('&&') if '&&' in words else len(words)
                printed += self.command(words[:end])
                words = words[end + 1:]
        return printed

    def command(self, words):
        given = {}
        while re.fullmatch(r'[A-Z_]+=.*', words[0]):
            name, _, given[name] = words[0].partition('=')
            words = words[1:]
        for begin, do in COMMANDS:
            if re.match(begin, ' '.join(words)):
                return do(self, words, given) or ''
        return pytest.fail(f'what is to be done with {words}?')

    def text(self, block, printed):
        assert block.is_next, 'this is the output of nothing; a drawing is "none"'
        pattern = re.escape(block.text.strip()).replace('…', '.*')
        assert re.fullmatch(pattern, printed.strip(), re.S), f'printed was {printed!r}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, disk_folder, tmp_path):
    folder = pathlib.Path(disk_folder)
    for name, content in PREPARED.get(page.name, {}).items():
        (folder / name).write_bytes(content)
    (folder / 'examples').symlink_to(ROOT / 'examples')
    environment = {**os.environ, **make_plugin_visible(tmp_path)}
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), environment.get('PYTHONPATH')]))
    reader = Reader(page, folder, environment)
    printed = None
    with contextlib.closing(reader):
        for block in blocks(page):
            print(f'{page.name}:{block.line}')      # shown if it fails
            if block.language == 'text':
                reader.text(block, printed)
            elif block.language in ('python', 'sh'):
                printed = getattr(reader, block.language)(block)


# Commands ----------------------------------------------------------------------------------------

def run(reader, words, given, statuses=(0,)):
    """As it stands."""
    words = {'python': [sys.executable], 'curl': ['curl', '-sS']}.get(words[0], words[:1]) + words[1:]
    if shutil.which(words[0]) is None:
        missing(f'{words[0]} is not installed')
    done = subprocess.run(words, cwd=reader.folder, env={**reader.environment, **given}, timeout=PATIENCE,
                          capture_output=True, text=True)
    assert done.returncode in statuses, done.stderr
    return done.stdout


def diagnose(reader, words, given):
    """As it stands; a machine that lacks something is none of ours."""
    return run(reader, words, given, statuses=(0, 1))


def serve(reader, words, given):
    """It is started, at an address of ours, asked, and stopped at the end of the page."""
    address = [] if '-b' in words else ['-b', reader.address]
    reader.server = subprocess.Popen(
        [sys.executable, '-m', *words, *address, '--log-level', 'error', '--graceful-timeout', '3'],
        cwd=reader.folder, env={**reader.environment, **given})
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), \
                urllib.request.urlopen(f'http://{reader.address}/', timeout=5) as answer:
            assert answer.status == 200
            return
        time.sleep(0.05)
    pytest.fail('the server does not answer')


def install(reader, words, given):
    """Nothing is installed: what is named must be there to be had, an extra or in one of them."""
    has_its_options(reader, ['pip', 'install', *options(words)], given)
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'setup.cfg')
    extras = settings['options.extras_require']
    known = {re.split('[<>=]', name)[0] for names in extras.values() for name in names.split()}
    for word in words[2:]:
        if not word.startswith('-'):
            name, extra = re.fullmatch(r'([\w.-]+)(?:\[([\w,]+)\])?', word).groups()
            assert name in {'.', 'greenaio'} | known, name
            assert not extra or set(extra.split(',')) <= set(extras), extra


def has_its_options(reader, words, given):
    """It would run for minutes or hours: it must be there, and have the options that are named."""
    program = [sys.executable, *(['-m', *words[:2]] if words[0] == 'pip' else words[1:2])]
    if words[1] == '-m':
        program += words[2:4] if words[2] == 'greenaio' else words[2:3]
    shown = help_of(tuple(program), reader.folder, reader.environment['PYTHONPATH'])
    for option in options(words):
        assert re.search(rf'(^|[\s,]){re.escape(option)}\b', shown), f'{words} has no {option}'


def options(words):
    return [word.partition('=')[0] for word in words if word.startswith('--')]


@functools.cache
def help_of(program, folder, path):
    return subprocess.run([*program, '--help'], cwd=folder, env={**os.environ, 'PYTHONPATH': path},
                          timeout=PATIENCE, check=True, capture_output=True, text=True).stdout


def setting_exists(reader, words, given):
    """It would change the machine."""
    name = words[2].partition('=')[0]
    assert os.path.exists('/proc/sys/' + name.replace('.', '/'))


# How a command begins, and what is done with it: the first that fits.
COMMANDS = [
    (r'pip install ', install),
    (r'gunicorn ', serve),
    (r'sysctl -w ', setting_exists),
    (r'curl |cat /proc/', run),
    (r'python -c |python \w+\.py|python -m greenaio run ', run),
    (r'python -m greenaio (doctor|config)\b', diagnose),
    (r'python -m greenaio bench .*--seconds 0\.', run),
    (r'python -m greenaio bench|python -m (pytest|sphinx|tests|benchmarks)|python (examples|benchmarks)/',
     has_its_options),
]


# Names -------------------------------------------------------------------------------------------

def sources():
    """The text of each module, with its declarations."""
    found = {}
    for path in sorted((ROOT / 'greenaio').rglob('*')):
        if path.suffix in ('.py', '.pyx', '.pxd'):
            found[path.stem] = found.get(path.stem, '') + path.read_text()
    return found


def test_words_for_those_who_know_qemu_are_those_of_the_code():
    house = sources()
    found = 0
    for line in (ROOT / 'docs' / 'words.md').read_text().splitlines():
        cells = line.split('|')
        for name in re.findall(r'`([A-Za-z_.]+)=?`', cells[2] if len(cells) > 3 else ''):
            owner, _, attribute = name.rpartition('.')
            if owner in ('loop', 'os') or name == 'Hub':
                continue                # gevent's, Python's
            assert any(re.search(rf'\bclass {owner}\b' if owner else r'', text)
                       and re.search(rf'\b{attribute}\b', text) for text in house.values()), name
            found += 1
    assert found > 40


def test_drawings_name_what_is_there():
    for page in PAGES:
        for block in blocks(page):
            if block.language == 'none':
                for name in re.findall(r'[\w/]+\.(?:pyx|pxd|py)\b', block.text):
                    assert (ROOT / 'greenaio' / name).exists(), f'{page.name}: {name}'
                for name in re.findall(r'\b[A-Z][a-z]+[A-Z]?\w*: ', block.text):
                    assert any(f'class {name[:-2]}' in text for text in sources().values()), name


def test_the_house_has_every_module():
    drawings = ''.join(block.text for block in blocks(ROOT / 'docs' / 'how-it-works.md')
                       if block.language == 'none')
    for path in (ROOT / 'greenaio').rglob('*'):
        if path.suffix in ('.py', '.pyx') and path.stem != '__init__':
            assert path.name in drawings, path.name


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)', (ROOT / 'README.md').read_text()):
        assert target.startswith('https://') or (ROOT / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / 'docs' / 'index.md').read_text()
    for page in PAGES[1:]:
        assert page.stem == 'index' or re.search(rf'^{page.stem}$', index, re.M), page.name


def test_every_setting_is_in_the_table_with_its_default():
    text = (ROOT / 'docs' / 'tuning.md').read_text()
    for name in (name for name in Config.__slots__ if not name.startswith('_')):
        default = getattr(Config(), name)
        assert f'| `{name}` | `GREENAIO_{name.upper()}` | {default:g} |' in text


def test_every_public_name_is_in_the_reference():
    text = (ROOT / 'docs' / 'api.md').read_text()
    for name in greenaio.__all__:
        assert name == '__version__' or f'greenaio.{name}' in text, name


# The reference -----------------------------------------------------------------------------------

@pytest.mark.parametrize('name, what, expected', [
    ('File', 'class', ('(path: StrPath, flags: int = os.O_RDONLY', '')),
    ('File.pread', 'method', ('(n: int, offset: int)', 'bytes')),
    ('File.from_fd', 'method', ('(fd: int, closefd: bool = False, *, max_batch: int = 32)', 'File')),
    ('aligned_buffer', 'function', ('(nbytes: int', 'memoryview')),
    ('os.pread', 'function', ('(fd: int, n: int, offset: int', 'bytes')),
])
def test_reference_tells_the_types_of_what_is_compiled(monkeypatch, name, what, expected):
    if not greenaio.native:
        missing('needs the extension')
    monkeypatch.setattr(sys, 'path', sys.path[:])
    signature_of_the_stub = runpy.run_path(str(ROOT / 'docs' / 'conf.py'))['signature_of_the_stub']
    thing = functools.reduce(getattr, name.split('.'), greenaio)
    arguments, result = signature_of_the_stub(None, what, f'greenaio.{name}', thing, None, '()', None)
    assert arguments.startswith(expected[0]) and result == expected[1]


def test_extra_for_the_docs_has_all_that_the_reference_imports():
    """Sphinx imports each module that it tells of."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'setup.cfg')
    extras = {name: set(lines.split()) for name, lines in settings['options.extras_require'].items()}
    assert extras['metrics'] | extras['wsgi'] <= extras['docs']
