"""How Sphinx makes the site: ``python -m sphinx -W docs docs/_build``, in a clone that was built."""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
HOUSE = HERE.parent / 'greenaio'
sys.path.insert(0, str(HERE.parent))

import greenaio  # noqa: E402  # of this clone

project = 'greenaio'
author = 'the greenaio authors'
copyright = f'{author}, MIT licence'
release = version = greenaio.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc']
exclude_patterns = ['_build']
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3

html_theme = 'furo'
html_title = f'greenaio {release}'
html_static_path = ['_static']
html_css_files = ['greenaio.css']
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    'light_css_variables': {'color-brand-primary': '#1a7f4b', 'color-brand-content': '#1a7f4b'},
    'dark_css_variables': {'color-brand-primary': '#5fd39a', 'color-brand-content': '#5fd39a'},
}

# In docstrings `single backticks` are names: of something here, a link, else code.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
autodoc_type_aliases = {'StrPath': 'StrPath'}
add_module_names = False
python_use_unqualified_type_names = True


DEFINITION = re.compile(r'^class (\w+)|^( *)def (\w+)\((?:self(?:, )?)?(.*?)\) -> (.*?): \.\.\.$',
                        re.M | re.S)


def _stubs() -> dict[str, tuple[str, str]]:
    """Arguments and result of what is compiled, as its stub has them: itself it tells no types, and of a
    class nothing at all. By ``_folder.module.Class.method``; those of ``__init__`` are the class's."""
    found = {}
    for path in HOUSE.rglob('*.pyi'):
        module = f'{path.parent.name}.{path.stem}'
        owner = ''
        for name, indent, function, arguments, result in DEFINITION.findall(path.read_text()):
            if name:
                owner = f'{module}.{name}'
                continue
            if not indent:
                owner = module
            where = owner if function == '__init__' else f'{owner}.{function}'
            found[where] = f'({" ".join(arguments.split())})', result
    return found


STUBS = _stubs()


def signature_of_the_stub(app: Any, what: str, name: str, thing: Any, options: Any, arguments: str | None,
                          result: str | None) -> tuple[str, str] | None:
    """For autodoc-process-signature."""
    if arguments is None or what not in ('class', 'function', 'method'):
        return None
    if what == 'method':        # which names no module, or no class, where it is compiled
        home = functools.reduce(getattr, name.split('.')[1:-1], greenaio)
        path = f'{home.__module__}.{home.__qualname__}.{name.rpartition(".")[2]}'
    else:
        path = f'{getattr(thing, "__module__", "")}.{getattr(thing, "__qualname__", "")}'
    arguments, result = STUBS.get(path.removeprefix('greenaio.'), (arguments, result or ''))
    arguments = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r'\1', arguments)    # Sphinx 9.0, of int | StrPath
    return arguments, '' if what == 'class' else result


def setup(app: Any) -> None:
    if not greenaio.native:
        raise RuntimeError('the extension is not built: the reference would be that of the threads alone')
    app.connect('autodoc-process-signature', signature_of_the_stub)
