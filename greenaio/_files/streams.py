"""Reading ahead of the reader, and writing behind the writer: several requests in flight, in order.

The page cache does that for buffered files. O_DIRECT goes around the page cache, so a file opened with
``direct=True`` has a `ReadAhead` and a `WriteBehind`. Each holds at most `DEPTH` blocks of `BLOCK_MIN` to
`BLOCK_MAX` bytes: 1 MiB if the program reads or writes little at a time, 8 MiB at most.
"""

from __future__ import annotations

import errno
import os
import posix
from collections import deque
from typing import Any

from greenaio._core.bell import generation
from greenaio._core.ends import was_thrown
from greenaio._files.arguments import flat
from greenaio._files.extension import File, aligned_buffer
from greenaio._files.shield import Shielded

# The greatest number of blocks that are in flight or wait for the reader.
DEPTH = 8
# In bytes. Smaller blocks cost more than they bring.
BLOCK_MIN = 128 << 10
# In bytes. Larger blocks are no faster.
BLOCK_MAX = 1 << 20
# So many reads in order come before the first read ahead.
SEQUENTIAL = 2


def block_size(nbytes: int) -> int:
    """Return the size of the blocks, in bytes, for a program that reads or writes *nbytes* at a time."""
    return min(max(1 << max(nbytes - 1, 0).bit_length(), BLOCK_MIN), BLOCK_MAX)


class Block:
    """A request that is under way, and its memory. If several are made at once, all of them except the last
    may set *more*; then they go to the kernel together."""

    __slots__ = ('_begun', '_file', '_generation', '_rest', 'data', 'memory', 'offset', 'reading')

    def __init__(self, file: File, reading: bool, memory: Any, nbytes: int, offset: int,
                 more: bool = False, *, held_back: bool = False) -> None:
        self.memory, self.data, self.offset, self.reading = memory, memory[:nbytes], offset, reading
        self._file = file
        self._generation = generation()
        self._begun: Any = None
        self._rest: Shielded | None = None
        try:
            if not held_back:
                self._begun = file.begin(reading, self.data, offset, more)
        except (OSError, RuntimeError):
            # `end` tries again, and raises the error.
            pass

    @property
    def leaves_hole(self) -> bool:
        """Whether some bytes of the block are neither written nor under way, because it was not begun or has
        failed."""
        if self._begun is None:
            # The block was not begun. `end` writes it.
            return True
        result = self._begun[1].result
        return result is not None and result != -errno.ECANCELED and bool(result < len(self.data))

    def forget_failure(self) -> None:
        """Have `end` write a failed block again, instead of raising its old error."""
        if self.leaves_hole:
            self._begun = None

    def end(self) -> int:
        """Wait for the request. Return the number of bytes moved. Make the request now if it could not be
        begun, or if another hub began it. Raise OSError.

        After a kill or an error `end` may be called again. After a kill it waits for the same request, so no
        abandoned write lands on top of a later one. After an error it writes the block again."""
        done = -errno.ECANCELED if self._begun is None else self._file.end(self._begun)
        self._begun = None
        if done < 0 and done != -errno.ECANCELED:
            raise OSError(-done, os.strerror(-done), self._file.name)
        if self.reading:
            return done if done >= 0 else self._file.preadv([self.data], self.offset)
        # After a fork the block belongs to the parent, and the memory is wiped in the child.
        if self._generation != generation():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self._file.name)
        return done if done == len(self.data) else self._write_rest(max(done, 0))

    def _write_rest(self, done: int) -> int:
        """Write the bytes from *done* on, in a greenlet of its own, so that a kill leaves no block half
        written. Return the length of the block."""
        def work() -> int:
            at = done
            while at < len(self.data):
                n = self._file.pwrite(self.data[at:], self.offset + at)
                if n == 0:
                    raise OSError(errno.EIO, 'no progress in a write')
                at += n
            return at

        if self._rest is None:
            self._rest = Shielded(self._file.fileno(), work)
        try:
            written = self._rest.get()
        except BaseException as error:
            if not was_thrown(error):
                self._rest = None
            raise
        self._rest = None
        return written


class ReadAhead:
    """Reads of a `File` in order, with up to *depth* blocks under way ahead of them.

    Reading ahead begins after `SEQUENTIAL` reads in order, with one block. The number of blocks doubles with
    each block that is used up. A read from another place stops it. A reader may miss bytes that another
    greenlet or process writes into the blocks that are read ahead.
    """

    def __init__(self, file: File, depth: int = DEPTH, eager: bool = False) -> None:
        self._file = file
        self._depth = depth
        # Begin with the first read.
        self._eager = eager
        self._blocks: deque[Block] = deque()
        # The memory of the block that is being read, as far as it was filled.
        self._head: Any = None
        # All memory of that block. The next request uses it again, because new memory has to be zeroed.
        self._used: Any = None
        self._head_offset = 0
        self._window = 1
        self._in_order = 0
        # The offset where a read in order would begin.
        self._position = 0
        # The offset where the last block ends.
        self._end = 0
        self._size = BLOCK_MIN
        self._generation = generation()

    def readinto(self, buffer: Any, position: int) -> int:
        """Read into *buffer* at *position*. Return the number of bytes read, which is less at the end of the
        file or of a block. Raise OSError."""
        view = flat(buffer)
        if position != self._position or self._generation != generation():
            # After a seek the blocks are of no use. In a forked child their memory is wiped.
            self.stop()
            self._in_order = 0
            self._generation = generation()
        self._in_order += 1
        try:
            n = self._from_blocks(view, position)
            if n == 0 and len(view):
                # The file is at its end, or nothing was read ahead.
                self.stop()
                n = self._file.preadv([view], position)
                self._end = position + n
        except BaseException:
            # After an error or a kill, a block may be lost, so begin again.
            self.stop()
            raise
        self._position = position + n
        if n == len(view) and (self._in_order >= SEQUENTIAL or self._eager):
            self._size = max(self._size, block_size(len(view)))
            self._ask_for_more()
        return n

    def _from_blocks(self, view: memoryview, position: int) -> int:
        """Copy bytes that were read ahead into *view*. Return their number, 0 if there are none."""
        done = 0
        while done < len(view):
            begin = position + done - self._head_offset
            if self._head is None or begin >= len(self._head):
                if not self._take_next(position + done):
                    break
                continue
            n = min(len(view) - done, len(self._head) - begin)
            view[done:done + n] = self._head[begin:begin + n]
            done += n
        return done

    def _take_next(self, position: int) -> bool:
        """Wait for the next block, and ask for one more in the memory of the last. Return whether the block
        has bytes."""
        if not self._blocks or self._blocks[0].offset != position:
            return False
        block = self._blocks.popleft()
        n = block.end()
        used, self._used = self._used, block.memory
        self._head, self._head_offset = block.data[:n], block.offset
        self._window = min(2 * self._window, self._depth)
        self._ask_for_more(used)
        return n > 0

    def _ask_for_more(self, used: Any = None) -> None:
        while len(self._blocks) < self._window:
            # The first block ends at a multiple of the size, so that all later blocks are aligned.
            nbytes = self._size - self._end % self._size
            memory = used if used is not None and len(used) == nbytes else aligned_buffer(nbytes)
            used = None
            self._blocks.append(Block(self._file, True, memory, nbytes, self._end))
            self._end += nbytes

    def stop(self) -> None:
        """Forget the blocks. A request that is under way keeps its memory until it is done."""
        self._blocks.clear()
        self._head = self._used = None
        self._window = 1


class WriteBehind:
    """Writes of a `File` in order, which go on while the writer goes on.

    An error is raised by a later `write`, at the latest by `drain`. The failed block and all later ones are
    kept, at most *depth* of them, as `io` keeps the bytes that its buffer could not write. Each later call
    writes the failed block again first, and raises again if that fails: no new block is sent before it has
    succeeded. So the file has no hole once `drain` has returned, and a disk that was full loses nothing once
    it has room again. Only blocks that were in flight together with the failed one may be on the disk before
    it.

    If a greenlet is killed here, nothing is lost either, because the next one waits for the same request.
    """

    def __init__(self, file: File, depth: int = DEPTH) -> None:
        self._file = file
        self._depth = depth
        self._blocks: deque[Block] = deque()
        # The memory of the block that is being filled, and its offset in the file.
        self._memory: Any = None
        self._begin = self._filled = 0
        # Whether the oldest block has failed or a greenlet waits for it. Then no block is sent after it.
        self._holds_back = False
        self._generation = generation()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to `drain`. In a forked child there is nothing, because the parent writes
        the blocks."""
        if self._generation != generation():
            self._generation = generation()
            self._blocks.clear()
            self._memory, self._filled, self._holds_back = None, 0, False
        return not self._blocks and not self._filled

    @property
    def end(self) -> int:
        """The offset where a write in order would begin."""
        return self._begin + self._filled

    def write(self, data: Any, position: int) -> int:
        """Take bytes-like *data* for *position*. Return the number of bytes taken: all, or fewer if there was
        an error, which the next call raises."""
        view = flat(data)
        self.is_idle                    # noqa: B018  # looks for a fork
        if position != self.end:
            # Blocks that overlap would be written in any order.
            self.drain()
        done = 0
        while done < len(view):
            if self._memory is None:
                try:
                    self._make_room()
                except Exception as error:
                    if done and not was_thrown(error):
                        return done
                    raise
                self._memory = aligned_buffer(block_size(len(view)))
                self._begin = position + done
            room = len(self._memory) - self._begin % len(self._memory) - self._filled
            n = min(room, len(view) - done)
            self._memory[self._filled:self._filled + n] = view[done:done + n]
            self._filled += n
            done += n
            if n == room:
                self._send()
        return done

    def _make_room(self) -> None:
        """Wait until another block may be taken. Raise the OSError of the oldest block."""
        while self._blocks and (self._holds_back or len(self._blocks) >= self._depth):
            self._settle()

    def _send(self) -> None:
        """Put the block that is being filled into the queue, and begin its write unless writes are held
        back."""
        memory, n, self._memory, self._filled = self._memory, self._filled, None, 0
        if n:
            self._begin += n
            self._holds_back = self._holds_back or self._has_hole()
            self._blocks.append(
                Block(self._file, False, memory, n, self._begin - n, held_back=self._holds_back))

    def _settle(self) -> None:
        """Wait for the oldest block, and raise its error. It stays in the queue until it is known to be
        written."""
        self._holds_back = True
        # The disk may have room by now.
        self._blocks[0].forget_failure()
        self._blocks[0].end()
        self._blocks.popleft()
        self._holds_back = self._has_hole()

    def _has_hole(self) -> bool:
        return any(block.leaves_hole for block in self._blocks)

    def write_plainly(self, fd: int) -> None:
        """Write all bytes that are not known to be written, by calls that block. A caller that can't park
        uses it. Raise OSError."""
        # Put the block that is being filled into the queue, and do not begin its write.
        self._holds_back = True
        self._send()
        while self._blocks:
            block, done = self._blocks[0], 0
            while done < len(block.data):
                done += posix.pwrite(fd, block.data[done:], block.offset + done)
            self._blocks.popleft()
        self._holds_back = False

    def drain(self) -> None:
        """Wait until all is written. Raise the OSError of the first block that could not be written, and keep
        that block."""
        while self._blocks or self._filled:
            if not self._holds_back:
                # The block is written beside the blocks that are under way.
                self._send()
            if self._blocks:
                self._settle()
