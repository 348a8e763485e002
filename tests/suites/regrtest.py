"""Run tests of CPython in a process that gevent patches; with GREENAIO_PATCH=1, greenaio does, too.

``regrtest.py [PATTERN ...] -- [ARGUMENT ...]``: the arguments are those of ``python -m test``. Tests that a
pattern names hang with gevent alone, and are left out there.
"""

import os
import runpy
import sys

import gevent
import gevent.monkey

end = sys.argv.index('--')
hanging, sys.argv[1:] = sys.argv[1:end], sys.argv[end + 1:]
gevent.monkey.patch_all()
gevent.get_hub()        # without a hub a patched call is the plain one

if os.environ.get('GREENAIO_PATCH') == '1':
    import greenaio.monkey
    greenaio.monkey.patch_all()
else:
    sys.argv += [argument for pattern in hanging for argument in ('--ignore', pattern)]

runpy.run_module('test', run_name='__main__', alter_sys=True)
