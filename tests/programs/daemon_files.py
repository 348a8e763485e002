"""A daemon closes all numbers under a hub, opens its files on them, forks, and ends the hub."""

import os
import tempfile
import warnings

import gevent

import greenaio.os
from greenaio._core import hub as _hub

warnings.simplefilter('ignore', DeprecationWarning)     # Python 3.12 of fork in a threaded process
gevent.get_hub()
greenaio.os.stat('.')
driver = _hub.get_driver()
os.closerange(3, 4096)
files = [tempfile.TemporaryFile(buffering=0) for _ in range(32)]     # noqa: SIM115
for file in files:
    file.write(bytes(64))
    file.seek(0)
before = [os.fstat(file.fileno()).st_ino for file in files]


def check():
    assert [os.fstat(file.fileno()).st_ino for file in files] == before
    for file in files:
        assert file.tell() == 0 and file.read() == bytes(64)
        file.seek(0)


driver.engine.context.signal()
driver.engine.context.clear()
check()
pid = os.fork()
if pid == 0:
    check()
    driver.close()
    check()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
driver.close()
check()
os._exit(0)         # the loop's own numbers are gone as well
