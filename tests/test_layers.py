"""Imports go strictly down, and the three sentences of the house hold."""

import pathlib
import re

import greenaio
from tests.support.processes import run_python

HOUSE = pathlib.Path(greenaio.__file__).parent

# One row for each folder, each with its modules. A module imports only modules to its left in its row, and
# modules of the rows above. `face` is the package itself: what users import.
ORDER = {
    'settings': '_config',
    '_core': 'abi fork bell handle eventfd context memory ends describe uninterrupted counters tally policy '
             'thread fifo request queues engine caller job mailbox processor worker threads pools '
             'dispatch parking driver shutdown loop hub',
    '_files': 'arguments unclosed sharing loop pool place portable portable_file sleeper waiter turn facts '
              'mounts device route paths steps walk ranges shield sectors changes transfers opening names '
              'seeks closing calls buffers inline direct buffered underway pread operation file extension '
              'pollable position streams copies zones semaphore',
    '_operate': 'stats blocked',
    'face': 'events fileobject block os __init__ wsgi monkey prometheus',
    '_commands': 'show bench doctor',
    'start': '__main__',
}
PLACES = {name if folder[0] != '_' else f'{folder}.{name}': (row, place)
          for row, (folder, names) in enumerate(ORDER.items()) for place, name in enumerate(names.split())}
IMPORT = re.compile(r'^\s*(?:from|cimport|import)\s+(greenaio[\w.]*)(?:\s+c?import\s+\(?(.+))?', re.M)


def sources():
    for path in sorted(HOUSE.rglob('*')):
        if path.suffix in ('.py', '.pyx', '.pxd'):
            name = '.'.join(path.relative_to(HOUSE).with_suffix('').parts)
            yield name.removesuffix('.__init__') if path.parent != HOUSE else name, path, path.read_text()


def modules():
    return [(name, path, text) for name, path, text in sources() if name not in ORDER]


def imported(text):
    for module, names in IMPORT.findall(text):
        _, _, module = module.partition('.')
        if module in PLACES:
            yield module
        for name in re.findall(r'\w+', names.split('#')[0]):
            whole = f'{module}.{name}' if module else name
            if whole in PLACES:
                yield whole


def test_every_module_has_its_place():
    assert {name for name, _, _ in modules()} == set(PLACES)


def test_imports_go_strictly_down():
    arrows = {(name, other) for name, _, text in modules() for other in imported(text) if name != other}
    assert {(name, other) for name, other in arrows if PLACES[other] >= PLACES[name]} == set()
    assert len(arrows) > 100


def test_handlers_of_forks_run_in_the_order_of_the_layers():
    """A handler uses the layers below, which must have been put right."""
    done = run_python('''
        import greenaio.block, greenaio.monkey, greenaio.os, greenaio.wsgi
        from greenaio._core.bell import _handlers
        print(*(getattr(one, '__module__', None) or type(one.__self__).__name__ for one in _handlers))
    ''')
    layers = [name.split('.')[1] for name in done.stdout.split() if name.startswith('greenaio._')]
    assert layers == sorted(layers, key=list(ORDER).index) and layers.count('_core') > 4


def test_only_the_context_knows_an_aio_structure():
    for name, _, text in sources():
        if name not in ('_core.abi', '_core.context'):
            assert not re.search(r'\b(iocb|io_event|aio_ring|_core\.abi)\b', code(text)), name


def test_engine_and_below_do_not_know_gevent():
    for name, _, text in modules():
        if PLACES[name] <= PLACES['_core.pools'] and name not in ('_core.ends', '_core.uninterrupted'):
            assert not re.search(r'\b(gevent|greenlet)\b\.?', imports(text)), name


def test_one_place_parks_and_one_place_wakes():
    for name, path, text in sources():
        if name == '_core.parking' and path.suffix == '.pyx':
            switches = [line.strip() for line in text.splitlines()
                        if 'greenlet_switch(' in line and 'static' not in line
                        and 'PyObject *to)' not in line]
            assert switches == ['greenlet_switch(to)', 'greenlet_switch(<PyObject *>waiter)']
        else:
            assert 'greenlet_switch' not in text
            assert not re.search(r'\.switch\(', text), name


def code(text):
    text = re.sub(r'"""(?!\n    [#/]).*?"""', '', text, flags=re.S)
    return re.sub(r'#.*', '', text)


def imports(text):
    return '\n'.join(line for line in text.splitlines() if re.match(r'\s*(from|import|cimport)\b', line))
