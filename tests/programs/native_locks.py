"""Find native locks that `gevent.monkey.patch_all(greenaio=True)` leaves, and a greenlet could wait for."""

import gevent.monkey

gevent.monkey.patch_all()
import greenaio.monkey

greenaio.monkey.patch_all()             # gevent finds the plugin only where greenaio is installed
import contextlib
import sys
import types

HARMLESS = (
    'gevent.',                          # its own
    'greenaio.monkey._replaced_locks',  # kept for unpatch_all
    'greenaio._files.ranges._lock',         # no greenlet switches while it is held
    'threading._',                      # held by threads that start and end
    'logging._lock', 'logging._defaultLastResort.lock',     # gevent's own repair
    '.lock',    # recursive: of a cached_property until Python 3.11. It stops no greenlet of its thread
)
recursive = gevent.monkey.get_original('_thread', 'RLock')
native = type(gevent.monkey.get_original('_thread', 'allocate_lock')()), recursive
looked_at: dict[int, object] = {}
found: list[tuple[str, bool]] = []


def look(value, path, depth):
    if id(value) in looked_at or depth > 7 or isinstance(value, types.ModuleType):
        return
    looked_at[id(value)] = value
    inside = {}
    if isinstance(value, native):
        found.append((path, isinstance(value, recursive)))
    elif isinstance(value, dict):
        inside = {f'[{str(key)[:40]!r}]': one for key, one in list(value.items())}
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = {f'[{i}]': one for i, one in enumerate(list(value)[:1000])}
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):       # an empty cell
                inside[f'<{len(inside)}>'] = cell.cell_contents
        inside['<defaults>'] = value.__defaults__
    elif isinstance(value, type):
        inside = {f'.{name}': one for name, one in vars(value).items()}
    else:
        inside = {f'.{name}': one for name, one in getattr(value, '__dict__', {}).items()}
        for kind in type(value).__mro__:
            slots = vars(kind).get('__slots__', ())
            for name in [slots] if isinstance(slots, str) else slots:
                inside[f'.{name}'] = getattr(value, name, None)
    for name, one in inside.items():
        look(one, path + name, depth + 1)


for name, module in sorted(sys.modules.items()):
    if module is not None and name != '__main__':
        for key, value in list(vars(module).items()):
            look(value, f'{name}.{key}', 0)
assert len(looked_at) > 5000
assert any(path.startswith(('gevent.', 'threading.')) for path, _ in found), found
left = [path for path, is_recursive in found
        if not path.startswith(HARMLESS[:-1]) and not (is_recursive and path.endswith(HARMLESS[-1]))]
assert not left, left
import tempfile

once_lock = vars(tempfile)['_once_lock']
assert once_lock is not None and not isinstance(once_lock, native)
