"""The extension modules; all else stands in setup.cfg."""

import importlib.util
import os
import sys

from setuptools import Extension, setup

# .pyx files listed as they are: cythonize() drops optional=True, and without a compiler, or on
# another system than Linux, greenaio must install all the same (it then uses threads).
NAMES = ['_context', '_engine', '_memory', '_hub', '_file']

greenlet = importlib.util.find_spec('greenlet')
headers = [os.path.dirname(os.path.dirname(greenlet.origin))] if greenlet else []

setup(ext_modules=[
    Extension(f'greenaio.{name}', [f'greenaio/{name}.pyx'], optional=True, include_dirs=headers,
              extra_compile_args=['-O2', '-fno-strict-aliasing'])
    for name in NAMES
] if sys.platform == 'linux' else [])
