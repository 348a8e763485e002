"""The audit events of the calls of `os` and `io`, plain and patched."""

import io
import os
import shutil
import sys

import gevent

import greenaio.monkey

os.chdir(sys.argv[1])
real = os.open, os.ftruncate, io.open, io.FileIO, shutil.copyfile, os.stat, os.fstat
greenaio.monkey.patch_all()
gevent.sleep(0)
ours = os.open, os.ftruncate, open, greenaio.fileobject.FileIO, greenaio.copyfile, os.stat, os.fstat
seen: list[tuple[object, ...]] = []
listening: list[tuple[str, ...]] = []


def hook(event, args):
    if not listening or event not in listening[0]:
        return
    if event == 'open' and (isinstance(args[0], int) or args[0] == os.devnull):
        return              # of the fd below a file object; and where arguments are tried, at their first use
    seen.append((event, *[(arg, type(arg)) for arg in args], gevent.getcurrent()))


sys.addaudithook(hook)


def events(call, *args):
    seen.clear()
    listening.append(('open', 'os.truncate', 'shutil.copyfile'))
    try:
        result = call(*args)
    except OSError:
        result = None
    listening.clear()
    if call in (real[0], ours[0]) and result is not None:
        os.close(result)
    elif hasattr(result, 'close'):
        result.close()
    return list(seen)
