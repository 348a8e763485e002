"""The extension modules; all else stands in setup.cfg."""

import importlib.util
import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if sys.platform != 'linux':
    sys.exit(f'greenaio is for Linux only, and this is {sys.platform}')

# The list has .pyx files, because cythonize() drops optional=True, and without a compiler greenaio must
# install all the same. It then uses Python threads.
NAMES = ['_core.fork', '_core.handle', '_core.eventfd', '_core.context', '_core.memory', '_core.tally',
         '_core.thread', '_core.fifo', '_core.request', '_core.queues', '_core.engine', '_core.caller',
         '_core.job', '_core.mailbox', '_core.processor', '_core.worker', '_core.threads', '_core.pools',
         '_core.dispatch', '_core.parking', '_core.driver', '_core.shutdown', '_core.loop', '_core.hub',
         '_files.facts', '_files.mounts', '_files.device', '_files.route', '_files.paths', '_files.steps',
         '_files.walk', '_files.changes', '_files.transfers', '_files.opening', '_files.names',
         '_files.seeks', '_files.closing', '_files.calls', '_files.buffers', '_files.inline',
         '_files.direct', '_files.buffered', '_files.underway', '_files.pread', '_files.operation',
         '_files.file']


class BuildAndCopy(build_ext):
    """Also puts the modules beside their sources: in a clone, ``python -m greenaio`` and ``-m pytest`` find
    the clone before what was installed, and would take it for greenaio without its extension."""

    def run(self):
        super().run()
        if not self.inplace and os.access('greenaio', os.W_OK):
            self.copy_extensions_to_source()

    def build_extension(self, extension):
        # setuptools would take a .c file of an earlier build in place of the .pyx file.
        if not importlib.util.find_spec('Cython'):
            raise CompileError('Cython is not installed')
        super().build_extension(extension)


def source_of(name):
    """A .py file that has a .pxd beside it is interpreted where it is not compiled."""
    path = 'greenaio/' + name.replace('.', '/')
    return f'{path}.py' if os.path.exists(f'{path}.py') else f'{path}.pyx'


greenlet = importlib.util.find_spec('greenlet')
headers = [os.path.dirname(os.path.dirname(greenlet.origin))] if greenlet else []

setup(cmdclass={'build_ext': BuildAndCopy}, ext_modules=[
    Extension(f'greenaio.{name}', [source_of(name)], optional=True, include_dirs=headers,
              extra_compile_args=['-O3', '-fno-strict-aliasing', '-fno-semantic-interposition'])
    for name in NAMES])
