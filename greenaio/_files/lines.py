# cython: language_level=3
"""The lines of a text file, cut out of blocks that are decoded whole.

`io` finds the next line in C, but only for its own class. A subclass pays for several calls of methods in
each line, ten times the price. So a file object of greenaio, unless a subclass overrides it, reads a block of
bytes from the layer below, decodes the block at once, and hands out its whole lines from an `io.StringIO`.

    bytes of the file        ... | lines handed out | lines in `text` | `tail` | not read ...
    the layer below stands                                                     ^

While a file is cut, the decoder of `io` knows nothing of the block. So each other method of the file first
calls `give_back`, which moves the file to the first line that was not handed out. That position can be
computed because the encodings in `EXACT` turn every text back into the bytes that it was.

A block with a carriage return, or with bytes that can't be decoded, is left to `io`, from its first line on.
`Cutter.cut` and `give_back` are for the greenlet that has the turn of the file.
"""

from __future__ import annotations

import codecs
import io
from typing import Any

# Encodings by their names in `codecs`. Each decodes strictly without a state, and uses the byte of the
# newline for nothing else.
EXACT = ('utf-8', 'ascii', 'iso8859-1')
# In bytes. As many as `io` reads for a text at a time, and as many as a block may have in a long run.
BLOCK_MIN, BLOCK_MAX = 8192, 65536
# Cookies of `tell` from here on have a state of the decoder.
STATELESS = 1 << 63

_tell, _seek, _next = io.TextIOWrapper.tell, io.TextIOWrapper.seek, io.TextIOWrapper.__next__


def is_exact(encoding: str, errors: str) -> bool:
    """Return whether lines of a text in *encoding* can be given back, with *errors* as `io` knows them."""
    return errors == 'strict' and codecs.lookup(encoding).name in EXACT


class Lines:
    """An iterator over the lines of *file*, whose state is in *cutter*."""

    def __init__(self, file: Any, cutter: Cutter) -> None:
        self._file = file
        self._cutter = cutter

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        # This needs no turn, because no greenlet switches in it.
        line: Any = self._cutter.decoded_line()
        return line if line is not None else self._cutter.next_line(self._file)     # type: ignore[no-any-return]


class Cutter:
    """The state of a text file that is cut. Each method gets the *file*, an `io.TextIOWrapper` with the
    argument *newline* None or a line feed, because a reference to it would be a cycle. Its method ``_io_cut``
    calls `cut` when it is the turn of the greenlet."""

    def __init__(self, encoding: str, newline: str | None) -> None:
        self._encoding = codecs.lookup(encoding).name
        self._translates = newline is None
        # Whole lines that were not handed out. None unless the file is being cut.
        self._text: Any = None
        self._tail = b''
        self._block = BLOCK_MIN
        self._is_left_to_io = False
        # Whether `tell` is refused, as in `io`: from a line until the end of the file, a flush or a seek.
        self.is_iterating = False
        # Whether a newline was found.
        self.has_cut = False

    def is_cutting(self) -> bool:
        """Return whether the file stands elsewhere than behind the lines that were handed out."""
        return self._text is not None

    def decoded_line(self) -> Any:
        """Return the next line if it is decoded, else None."""
        return None if self._text is None else next(self._text, None)

    def next_line(self, file: Any) -> Any:
        """Return the next line. Raise StopIteration at the end of the file."""
        line: Any = self.decoded_line()
        if line is None and not self._is_left_to_io:
            line = file._io_cut()
            if line == '' and not self._is_left_to_io:
                self.is_iterating = False
                raise StopIteration
        return line or _next(file)

    def cut(self, file: Any) -> Any:
        """Read a block and return its first line. Return an empty string at the end of the file, and if `io`
        has to find the line."""
        # Another greenlet may have read a block while this one waited for its turn.
        line = self.decoded_line()
        if line is not None:
            return line
        if file.closed:
            # Raise its error.
            return _next(file)
        if self._text is None and not self._begin(file):
            return ''
        self.is_iterating = True
        while True:
            data = file.buffer.read1(self._block)
            if not data:
                return self._finish(file)
            self._tail += data
            if self._translates and b'\r' in data or len(self._tail) > 2 * BLOCK_MAX:
                return self._leave_to_io(file)
            # As `io` does, find each error of the block now.
            text = self._decode(self._tail, False)
            if text is None:
                return self._leave_to_io(file)
            past = text.rfind('\n') + 1
            if past:
                break
        self._text = io.StringIO(text[:past], newline='\n')
        self._tail = self._tail[self._tail.rfind(b'\n') + 1:]
        self._block = min(2 * self._block, BLOCK_MAX)
        self.has_cut = self._translates
        return next(self._text)

    def give_back(self, file: Any) -> None:
        """Move the file to the first line that was not handed out."""
        text, self._text = self._text, None
        if text is None:
            return
        rest, is_iterating = text.getvalue()[text.tell():], self.is_iterating
        if rest or self._tail:
            try:
                # This also flushes the file.
                _seek(file, file.buffer.tell() - len(self._tail) - len(rest.encode(self._encoding)))
            except BaseException:
                self._text = text
                raise
            finally:
                self.is_iterating = is_iterating
        self._tail = b''

    def _begin(self, file: Any) -> bool:
        """Have the file forget what it has decoded. Return whether it can be cut from here on."""
        if file._io_has_decoded:
            # `tell` forgets kinds of newlines.
            newlines = file.newlines
            cookie = _tell(file) if newlines in (None, '\n') else STATELESS
            self.has_cut = newlines == '\n'
            if cookie >= STATELESS:
                self._is_left_to_io = True
                return False
            _seek(file, cookie)
            file._io_has_decoded = False
        self._block = BLOCK_MIN
        self._text = io.StringIO()
        return True

    def _finish(self, file: Any) -> Any:
        """Return the last line, which has no newline. After it the file stands at its end."""
        line = self._decode(self._tail, True)
        if line is None:
            return self._leave_to_io(file)
        self._text, self._tail = None, b''
        return line

    def _leave_to_io(self, file: Any) -> str:
        self.give_back(file)
        self._is_left_to_io = True
        # From now on `io` knows.
        self.is_iterating = False
        return ''

    def _decode(self, data: bytes, is_whole: bool) -> str | None:
        """Return *data* as text, or None if it is not in the encoding. The last character may lack bytes,
        unless the data is the rest of the file."""
        try:
            if self._encoding == 'utf-8':
                return codecs.utf_8_decode(data, 'strict', is_whole)[0]
            return data.decode(self._encoding)
        except UnicodeDecodeError:
            return None
