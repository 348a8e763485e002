"""A file system of one file whose operations fail on demand: ``python faulty.py MOUNT CONTROL``.

The control file holds lines "operation errno", for read, write and fsync; operations that are not named
there work. An ioctl makes a file beside it. A flush waits as long as there is a file CONTROL-flush. There are
directories, of any name that begins with "folder", and links, "link...", to the path that CONTROL-link names.
As long as there is a file CONTROL-again, each of these is found once, and the second look-up waits. Further
arguments are options of the mount, such as ``attr_timeout=0`` or ``default_permissions=True``.
"""

import errno
import os
import stat
import sys
import time

import mfusepy

SIZE = 1 << 20


class Faulty(mfusepy.Operations):
    def __init__(self, control):
        self.control = control
        self.data = bytearray(SIZE)
        self.seen = set()

    def _fail(self, operation):
        with open(self.control) as file:
            for line in file:
                name, code = line.split()
                if name == operation:
                    raise mfusepy.FuseOSError(getattr(errno, code))

    def _wait_while(self, name):
        while os.path.exists(f'{self.control}-{name}'):
            time.sleep(0.01)

    def _find(self, path):
        if path in self.seen:
            self._wait_while('again')
        self.seen.add(path)

    def getattr(self, path, fh=None):
        if path.startswith('/link'):
            return {'st_mode': stat.S_IFLNK | 0o777, 'st_nlink': 1}
        if path == '/' or path.startswith('/folder'):
            if path != '/':
                self._find(path)
            return {'st_mode': stat.S_IFDIR | 0o755, 'st_nlink': 2}
        if path == '/data':
            return {'st_mode': stat.S_IFREG | 0o644, 'st_nlink': 1, 'st_size': SIZE}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def readdir(self, path, fh):
        return ['.', '..', 'data']

    def readlink(self, path):
        self._find(path)
        with open(self.control + '-link') as file:
            return file.read()

    def open(self, path, flags):
        return 0

    def read(self, path, size, offset, fh):
        self._fail('read')
        return bytes(self.data[offset:offset + size])

    def write(self, path, data, offset, fh):
        self._fail('write')
        self.data[offset:offset + len(data)] = data
        return len(data)

    def ioctl(self, path, cmd, arg, fh, flags, data):
        with open(self.control + '-ioctl', 'w'):
            raise mfusepy.FuseOSError(errno.ENOTTY)

    def flush(self, path, fh):
        self._wait_while('flush')
        return 0

    def fsync(self, path, datasync, fh):
        self._fail('fsync')
        return 0


if __name__ == '__main__':
    mfusepy.FUSE(Faulty(sys.argv[2]), sys.argv[1], foreground=True,
                 **{name: {'True': True, 'False': False}.get(value, value)
                    for name, value in (option.split('=') for option in ['nothreads=True', *sys.argv[3:]])})
