"""Files that only their owner may use.

The threads of the device start before this one changes its credentials.
"""

import ctypes
import errno
import os
import sys

import gevent

import greenaio
import greenaio.os

libc = ctypes.CDLL(None, use_errno=True)
folder = sys.argv[1]
os.chdir(folder)
os.chmod(folder, 0o777)
NOBODY = 65534


def write(name, mode=0o666):
    os.close(greenaio.os.open(name, os.O_WRONLY | os.O_CREAT, mode))


def owner(name):
    st = os.stat(name)
    return st.st_uid, st.st_gid


def outcome(call, *args):
    try:
        greenaio.os.close(call(*args))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return 'done'


def attempts(tag):
    return {'read': outcome(greenaio.os.open, 'secret', os.O_RDONLY),
            'write': outcome(greenaio.os.open, 'secret', os.O_RDWR),
            'create': outcome(greenaio.os.open, f'closed/{tag}', os.O_WRONLY | os.O_CREAT)}


os.umask(0)
os.mkdir('closed', 0o700)
with open('secret', 'w') as file:
    file.write('secret')
os.chmod('secret', 0o600)
gevent.joinall([gevent.spawn(write, f'warm{i}') for i in range(8)], raise_error=True)
ALL = {'read': 'done', 'write': 'done', 'create': 'done'}
NONE = {'read': 'EACCES', 'write': 'EACCES', 'create': 'EACCES'}
assert attempts('before') == ALL
