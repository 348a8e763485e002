"""A file system with a file that has no position, and an ordinary one: ``python streaming.py MOUNT``. The
first is open direct_io and nonseekable, as mounts that stream are, and its size is not known."""

import errno
import stat
import sys

import mfusepy

DATA = b''.join(b'line %d\n' % i for i in range(3000))


class Streaming(mfusepy.Operations):
    use_ns = True

    def getattr(self, path, fh=None):
        if path == '/':
            return {'st_mode': stat.S_IFDIR | 0o755, 'st_nlink': 2}
        if path == '/stream':
            return {'st_mode': stat.S_IFREG | 0o666, 'st_nlink': 1, 'st_size': 0}
        if path == '/ordinary':
            return {'st_mode': stat.S_IFREG | 0o666, 'st_nlink': 1, 'st_size': len(DATA)}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def open(self, path, info):
        info.fh, info.direct_io, info.nonseekable = 1, True, path == '/stream'
        return 0

    def read(self, path, size, offset, info):
        return DATA[offset:offset + size]

    def write(self, path, data, offset, info):
        return len(data)

    def truncate(self, path, length, fh=None):
        return 0


if __name__ == '__main__':
    mfusepy.FUSE(Streaming(), sys.argv[1], foreground=True, raw_fi=True, nothreads=True)
