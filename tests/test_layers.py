"""Imports go strictly down, and the three sentences of the house hold."""

import pathlib
import re

import greenaio

HOUSE = pathlib.Path(greenaio.__file__).parent
LAYERS = {
    '_abi': 0, '_config': 0, '_show': 0, '_fork': 0, '_bell': 0.5, '_handle': 0.7, '_sharing': 0.6,
    '_context': 1, '_memory': 1, '_ends': 1, '_describe': 1, '_uninterrupted': 1,
    '_engine': 2, '_threads': 2.5,
    '_blocked': 2.6, '_hub': 3, 'events': 3.5,
    '_fallback': 4, '_route': 4, '_sleeper': 4, 'alignment': 4.2, '_calls': 4.5, '_turn': 4.5, '_file': 5,
    '_extension': 5.2,
    '_position': 5.5, 'streams': 5.6, 'fileobject': 5.7, '_zones': 5.5, 'block': 5.7, 'os': 6,
    '_stats': 6, '_semaphore': 6, '__init__': 6.5, 'wsgi': 7, 'monkey': 7, 'bench': 7, 'doctor': 7,
    'prometheus': 7.5, '__main__': 8,
}
IMPORT = re.compile(r'^\s*(?:from|cimport|import)\s+(greenaio[\w.]*)(?:\s+c?import\s+(.+))?', re.M)


def sources():
    for path in sorted(HOUSE.iterdir()):
        if path.suffix in ('.py', '.pyx', '.pxd'):
            yield path, path.read_text()


def imported(text):
    for module, names in IMPORT.findall(text):
        if module == 'greenaio':
            for name in re.findall(r'\w+', names.split('#')[0]):
                if name in LAYERS:
                    yield name
        else:
            yield module.split('.')[1]


def test_every_module_has_its_layer():
    assert {path.stem for path, _ in sources()} <= set(LAYERS)


def test_imports_go_strictly_down():
    for path, text in sources():
        for name in imported(text):
            if name != path.stem:
                assert LAYERS[name] < LAYERS[path.stem], f'{path.name} imports {name}'


def test_only_the_context_knows_an_aio_structure():
    for path, text in sources():
        if path.stem not in ('_abi', '_context'):
            assert not re.search(r'\b(iocb|io_event|aio_ring|_abi)\b', code(text)), path.name


def test_engine_and_below_do_not_know_gevent():
    for path, text in sources():
        if LAYERS[path.stem] <= 2 and path.stem not in ('_ends', '_uninterrupted'):
            assert not re.search(r'\b(gevent|greenlet)\b\.?', imports(text)), path.name


def test_one_place_parks_and_one_place_wakes():
    for path, text in sources():
        if path.stem == '_hub' and path.suffix == '.pyx':
            switches = [line.strip() for line in text.splitlines()
                        if 'greenlet_switch(' in line and 'static' not in line
                        and 'PyObject *to)' not in line]
            assert switches == ['greenlet_switch(to)', 'greenlet_switch(<PyObject *>waiter)']
        else:
            assert 'greenlet_switch' not in text
            assert not re.search(r'\.switch\(', text), path.name


def code(text):
    text = re.sub(r'"""(?!\n    [#/]).*?"""', '', text, flags=re.S)
    return re.sub(r'#.*', '', text)


def imports(text):
    return '\n'.join(line for line in text.splitlines() if re.match(r'\s*(from|import|cimport)\b', line))
