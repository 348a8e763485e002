"""Runs the tests over an extension that watches its own memory: ``python -m tests.sanitizers``.

``address`` builds a copy of the sources with gcc's AddressSanitizer and UndefinedBehaviorSanitizer;
``valgrind`` runs a plain copy, and fewer tests, under memcheck, which sees Python itself too. More arguments
go to pytest, and paths among them replace the tests that are run otherwise. ``--prove`` breaks the copy in
one way after another instead, and expects that each is found. The exit status is 1 when something was found,
or a test failed.

Neither tool sees what the kernel writes, nor what is kept for later instead of being freed. So the copy is
changed: it looks at the memory of every request as that is submitted and again when it is done, and hides
what lies idle.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL = ('context engine memory hub file fork races stress threads calls alignment fileobject file_sharing '
       'streams block monkey libuv errno')
FEW = 'engine context memory hub file'

# What can't work, and why.
DESELECTED = {
    'address': {
        'tests/test_context.py::test_child_does_not_inherit_the_ring': 'wants to die by SIGSEGV',
        'tests/test_stress.py::test_every_place_of_a_batch_may_be_bad': 'has memory that nobody may read',
        'tests/test_stress.py::test_million_requests_do_not_grow_the_process': 'what is freed stays',
        'tests/test_libuv.py::test_on_the_other_loop[test_stress]': 'the same',
        'tests/test_block.py::test_what_is_refused_waits_for_nothing_and_costs_nothing': 'wants too much',
        'tests/test_memory.py::test_ten_thousand_waiting_greenlets_cost_at_most_a_kibibyte_each': 'red zones',
    },
    'valgrind': {
        'tests/test_context.py::test_child_does_not_inherit_the_ring': 'wants to die by SIGSEGV',
        'tests/test_memory.py::test_ten_thousand_waiting_greenlets_cost_at_most_a_kibibyte_each': 'red zones',
        'tests/test_hub.py::test_hundred_thousand_inline_completions_use_constant_stack': 'takes an hour',
        'tests/test_file.py::test_signals_disturb_nothing': 'signals come when their handler is gone',
    },
}

LOOK = '''
cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>
    #include <sys/uio.h>

    static inline void look_at(const struct iovec *v, long count)
    {
        volatile const char *at;
        long i;
        size_t n;
        for (i = 0; i < count; i++) {
            at = (volatile const char *)v[i].iov_base;
            for (n = 0; n < v[i].iov_len; n += 64)
                (void)at[n];
            if (v[i].iov_len)
                (void)at[v[i].iov_len - 1];
        }
    }
    static inline void *remembered(const struct iovec *v, long count)
    {
        struct iovec *copy = malloc((count ? count : 1) * sizeof *v);
        memcpy(copy, v, count * sizeof *v);
        look_at(copy, count);
        return copy;
    }
    """
    void look_at(const iovec *v, long count) nogil
    void *remembered(const iovec *v, long count) nogil
'''

HIDE = '''
cdef extern from *:
    """
    #ifdef __SANITIZE_ADDRESS__
    #include <sanitizer/asan_interface.h>
    #define HIDE ASAN_POISON_MEMORY_REGION
    #define SHOW ASAN_UNPOISON_MEMORY_REGION
    #else
    #include <valgrind/memcheck.h>
    #define HIDE VALGRIND_MAKE_MEM_NOACCESS
    #define SHOW VALGRIND_MAKE_MEM_DEFINED
    #endif
    """
    void HIDE(void *at, size_t n)
    void SHOW(void *at, size_t n)
'''

# File, text, what takes its place: each has to be there, once.
CHANGES = [
    ('setup.py', "'-O3', ", ''),
    # A request that is let go is freed, not kept for the next.
    ('greenaio/_core/request.pyx', '@cython.freelist(256)\n', ''),
    # What the kernel was given has to be there when it is done.
    ('greenaio/_core/request.pxd', '    cdef void *following\n\n    cdef int pin(',
     '    cdef void *following\n    cdef iovec *_looked_at\n    cdef int _looked_at_count\n\n'
     '    cdef int pin('),
    ('greenaio/_core/engine.pyx', '\ncdef enum:\n    STALL_NS', '''
from libc.stdlib cimport free

from greenaio._core.request cimport iovec
''' + LOOK + '\ncdef enum:\n    STALL_NS'),
    ('greenaio/_core/engine.pyx', '        return self.context.stage(<uint64_t>', '''\
        free(request._looked_at)
        request._looked_at_count = request.buffer_count
        request._looked_at = <iovec *>remembered(request.buffers, request._looked_at_count)
        return self.context.stage(<uint64_t>'''),
    ('greenaio/_core/queues.pyx', '\n\ncdef class Queues(', '''
from libc.stdlib cimport free

from greenaio._core.request cimport iovec
''' + LOOK + '\n\ncdef class Queues('),
    ('greenaio/_core/queues.pyx', '            self.in_flight.remove(request)\n', '''\
            self.in_flight.remove(request)
            look_at(request._looked_at, request._looked_at_count)
'''),
    ('greenaio/_core/request.pyx', '        free(self.job)\n',
     '        free(self.job)\n        free(self._looked_at)\n'),
    ('greenaio/_core/job.pyx', '\ncdef enum:\n    SHORT_BYTES', LOOK + '\ncdef enum:\n    SHORT_BYTES'),
    ('greenaio/_core/job.pyx', '    return -c_errno if result < 0 else result\n', '''\
    if result < 0:
        result = -c_errno
    if one.number == SYS_preadv2 or one.number == SYS_pwritev2:
        look_at(<iovec *>one.args[1], one.args[2])
    return result
'''),
    # Longer than valgrind thinks that io_setup makes it.
    ('greenaio/_core/context.pyx', '\ncdef enum:\n', HIDE + '\ncdef enum:\n'),
    ('greenaio/_core/context.pyx', '        size = (size + PAGE - 1) & ~<size_t>(PAGE - 1)\n', '''\
        size = (size + PAGE - 1) & ~<size_t>(PAGE - 1)
        SHOW(<void *>self._ctx, size)
'''),
    # Blocks are mapped, and kept.
    ('greenaio/_core/memory.pyx', '\ncdef enum:\n', HIDE + '\ncdef enum:\n'),
    ('greenaio/_core/memory.pyx', '        self.nbytes = nbytes\n', '''\
        self.nbytes = nbytes
        HIDE(self._block, self._capacity)
        SHOW(self.address, nbytes)
'''),
    ('greenaio/_core/memory.pyx', '            _kept[kind][_kept_count[kind]] = self._block\n', '''\
            HIDE(self._block, self._capacity)
            _kept[kind][_kept_count[kind]] = self._block
'''),
    ('greenaio/_core/memory.pyx', '            munmap(self._block, self._capacity)\n', '''\
            SHOW(self._block, self._capacity)
            munmap(self._block, self._capacity)
'''),
]

# What is broken, file, text, what takes its place, tests, what address and valgrind (if it can) report.
BREAKS = [
    ('a list that owns no reference', 'greenaio/_core/request.pxd', '        Py_INCREF(request)\n', '',
     ['tests/test_engine.py'], 'heap-use-after-free', 'Invalid read'),
    ('a byte behind the buffer', 'greenaio/_core/memory.pyx', 'memset(buffer.address, 0, n)',
     'memset(buffer.address, 0, n + 1)', ['tests/test_memory.py'], 'use-after-poison', 'Invalid write'),
    ('the iovec freed as it is submitted', 'greenaio/_core/queues.pyx', '        self.submitted += 1\n',
     '        self.submitted += 1\n        free(request.buffers)\n',
     ['tests/test_file.py', '-k', 'test_preadv_fills'], 'attempting double-free', 'Invalid free'),
    ('buffers let go by a kill', 'greenaio/_core/parking.pyx',
     '            # The engine keeps it, and a pass releases it after its event.\n',
     '            request.release()\n',
     ['tests/test_hub.py', '-k', 'kill'], 'use-after-', 'Invalid read'),
    ('an end of a file that overflows', 'greenaio/_files/route.pyx',
     '<uint64_t>request.offset + request.nbytes > <uint64_t>file_size(request.fd)',
     'request.offset + <int64_t>request.nbytes > file_size(request.fd)',
     ['tests/test_file.py', '-k', 'test_bad_arguments'], '__ubsan_handle_add_overflow', None),
]


def replace(source: Path, name: str, old: str, new: str) -> None:
    path = source / name
    text = path.read_text()
    if text.count(old) != 1:
        sys.exit(f'{name} has {text.count(old)} times, not once: {old!r}')
    path.write_text(text.replace(old, new))


def copy(target: Path) -> None:
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(
        '.git', '.*_cache', '.hypothesis', '__pycache__', 'build', '*.so'))
    for built in target.glob('greenaio/*/*.c'):
        built.unlink()
    for change in CHANGES:
        replace(target, *change)


def build(source: Path, mode: str) -> None:
    flags = '-g -O1 -fno-omit-frame-pointer'
    if mode == 'address':
        # Greenlet copies stacks about, of which the red zones of a frame know nothing.
        flags += ' -fsanitize=address,undefined -fno-sanitize-recover=undefined --param=asan-stack=0'
    done = subprocess.run([sys.executable, 'setup.py', 'build_ext', '--inplace', f'-j{os.cpu_count()}'],
                          cwd=source, env={**os.environ, 'CFLAGS': flags, 'CC': 'gcc'},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    missing = [path.stem for path in (source / 'greenaio').rglob('*.pyx')
               if not list(path.parent.glob(f'{path.stem}.*.so'))]
    if done.returncode or missing or 'WARNING: building extension' in done.stdout:
        sys.exit(f'{done.stdout}\ncould not be built: {missing}')


def library(name: str) -> str:
    path = subprocess.run(['gcc', f'-print-file-name={name}'], check=True, capture_output=True,
                          text=True).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f'gcc has no {name}')
    return path


def settings(source: Path, mode: str, reports: Path) -> dict[str, str]:
    """The environment of the tests and of all that they start."""
    env = {**os.environ, 'PYTHONPATH': str(source), 'PYTHONMALLOC': 'malloc', 'PYTHONDONTWRITEBYTECODE': '1'}
    if mode == 'address':
        # Undefined behaviour aborts, which AddressSanitizer reports with the name of the handler: libubsan's
        # own log does not work beside libasan's. Python never frees a good part of its memory: test_leaks.py
        # counts instead.
        env['LD_PRELOAD'] = f"{library('libasan.so')} {library('libstdc++.so')}"      # greenlet throws
        env['ASAN_OPTIONS'] = f'detect_leaks=0:handle_abort=2:handle_segv=2:log_path={reports}/report'
        env['UBSAN_OPTIONS'] = 'abort_on_error=1'
    return env


def command(mode: str, reports: Path) -> list[str]:
    if mode == 'address':
        return [sys.executable]
    # Greenlet moves stacks, of which memcheck can't know what is defined.
    return ['valgrind', '--undef-value-errors=no', '--leak-check=no', '--max-stackframe=134217728', '--quiet',
            '--error-exitcode=99', f'--suppressions={ROOT}/tests/valgrind.supp', '--trace-children=yes',
            '--trace-children-skip=/usr/*,/bin/*,/sbin/*', f'--log-file={reports}/report.%p', sys.executable]


def run(source: Path, mode: str, arguments: list[str]) -> tuple[int, str]:
    """Run pytest; return its status, and what was reported."""
    reports = Path(tempfile.mkdtemp(dir=source.parent, prefix='reports-'))
    done = subprocess.run([*command(mode, reports), '-m', 'pytest', '-q', '-p', 'no:faulthandler',
                           '-p', 'no:cacheprovider', *arguments],
                          cwd=source, env=settings(source, mode, reports), stderr=subprocess.PIPE, text=True,
                          errors='replace')
    found = ''.join(path.read_text(errors='replace') for path in sorted(reports.iterdir()))
    if mode == 'address' and 'ERROR' not in found:
        found = ''                      # a warning that greenlets move stacks
    if mode == 'valgrind':              # it warns of system calls that it does not know
        found = ''.join(line for line in found.splitlines(True) if not re.match(r'--\d+-- ', line))
    if 'Sanitizer' in done.stderr:      # an abort is reported there, if pytest does not capture it
        found += done.stderr
    return done.returncode, found


def prove(source: Path, mode: str) -> int:
    missed = []
    for what, name, old, new, arguments, *words in BREAKS:
        word = words[mode == 'valgrind']
        if word is None:
            continue
        kept = (source / name).read_text()
        replace(source, name, old, new)
        build(source, mode)
        status, found = run(source, mode, ['--capture=sys', *arguments])
        seen = bool(status) and word in found
        print(f'{what}: {"found" if seen else "MISSED"} (status {status}, {found[:300]!r})', flush=True)
        if not seen:
            missed.append(what)
        (source / name).write_text(kept)
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.sanitizers', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', nargs='?', choices=('address', 'valgrind'), default='address')
    parser.add_argument('--prove', action='store_true', help='break it, and expect that this is found')
    options, arguments = parser.parse_known_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='greenaio-sanitizers-') as folder:
        source = Path(folder, 'source')
        copy(source)
        build(source, options.mode)
        print(f'built in {time.monotonic() - began:.0f} s', flush=True)
        if options.prove:
            return prove(source, options.mode)
        if not any(re.match(r'tests/', argument) for argument in arguments):
            names = ALL if options.mode == 'address' else FEW
            arguments += [f'tests/test_{name}.py' for name in names.split()]
        for test, reason in DESELECTED[options.mode].items():
            print(f'left out: {test}: {reason}')
            arguments.append(f'--deselect={test}')
        status, found = run(source, options.mode, arguments)
        print(found)
        seconds = time.monotonic() - began
        print(f'{seconds:.0f} s, pytest {status}, {"reports above" if found else "no reports"}')
    return 1 if status or found else 0


if __name__ == '__main__':
    sys.exit(main())
