from greenaio._files.changes import ftruncate as ftruncate
from greenaio._files.changes import posix_fallocate as posix_fallocate
from greenaio._files.changes import settle as settle
from greenaio._files.closing import close as close
from greenaio._files.names import fstat as fstat
from greenaio._files.names import stat as stat
from greenaio._files.names import unlink as unlink
from greenaio._files.opening import open as open
from greenaio._files.opening import open_here as open_here
from greenaio._files.paths import working_directory as working_directory
from greenaio._files.seeks import extents as extents
from greenaio._files.seeks import initialize as initialize
from greenaio._files.seeks import lseek as lseek
from greenaio._files.transfers import copy_file_range as copy_file_range
from greenaio._files.transfers import readahead as readahead
from greenaio._files.transfers import sendfile as sendfile
from greenaio._files.transfers import start_writing as start_writing

def learn_umask() -> None: ...
def errors_of_newer_calls() -> dict[str, int]: ...
def umask(mask: int, /) -> int: ...
def ioctl(fd: int, number: int, argument: bytes) -> bytes: ...
