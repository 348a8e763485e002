"""A file system that shows a folder, and is asked for each stat: ``python loopback.py FOLDER MOUNT``.
An ioctl fills its argument with zeros.
"""

import ctypes
import errno
import os
import sys

import mfusepy


class Loopback(mfusepy.Operations):
    use_ns = True

    def __init__(self, folder):
        self.folder = folder

    def _path(self, path):
        return self.folder + path

    def getattr(self, path, fh=None):
        try:
            status = os.lstat(self._path(path))
        except OSError as error:
            raise mfusepy.FuseOSError(error.errno) from None
        return {name: getattr(status, name) for name in (
            'st_mode', 'st_nlink', 'st_size', 'st_blocks', 'st_uid', 'st_gid', 'st_rdev', 'st_ino')}

    def readdir(self, path, fh):
        return ['.', '..', *os.listdir(self._path(path))]

    def mknod(self, path, mode, dev):
        os.mknod(self._path(path), mode, dev)

    def unlink(self, path):
        os.unlink(self._path(path))

    def rename(self, old, new):
        os.rename(self._path(old), self._path(new))

    def create(self, path, mode, fi=None):
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT, mode)

    def open(self, path, flags):
        # The kernel finds the place of an append. What it caches it reads, even for a writer.
        return os.open(self._path(path),
                       os.O_RDWR | flags & os.O_TRUNC if flags & os.O_ACCMODE else os.O_RDONLY)

    def release(self, path, fh):
        os.close(fh)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self._path(path), length)

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def ioctl(self, path, cmd, arg, fh, flags, data):
        ctypes.memset(data, 0, cmd >> 16 & 0x3FFF)
        return 0

    def fallocate(self, path, mode, offset, size, fh):
        raise mfusepy.FuseOSError(errno.EOPNOTSUPP)


if __name__ == '__main__':
    mfusepy.FUSE(Loopback(sys.argv[1]), sys.argv[2], foreground=True, nothreads=True, attr_timeout=0)
