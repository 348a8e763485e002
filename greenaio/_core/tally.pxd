from libc.stdint cimport uint64_t

# The ways that a request can take, as far as the statistics tell them apart. An operation that was done
# inline is only counted, because a look at the clock would be a tenth of its price.
cdef enum:
    BY_AIO = 0
    BY_THREAD = 1
    WAYS = 2

# The kinds of operations. `Request.direction` has one of these numbers.
cdef enum:
    READ = 0
    WRITE = 1
    SYNC = 2
    OTHER = 3
    DIRECTIONS = 4

# The buckets of a histogram: eight for each power of two of nanoseconds, up to
# 2 ** 38 ns or 4.6 minutes. Longer times count in the last bucket. Buckets of
# equal width would be too coarse for the page cache, or too many for a disk.
cdef enum:
    BUCKETS = 288

# The times of requests, each from its first offer to the kernel or a thread.
cdef struct histogram:
    uint64_t total                  # ns
    uint64_t longest                # ns
    uint64_t counts[BUCKETS]

# `greenaio._core.counters` explains each counter. A new one
# also needs a row there, and a line in `Tally.add`.
cdef class Tally:
    cdef readonly uint64_t submitted
    cdef readonly uint64_t completed
    cdef readonly uint64_t batches
    cdef readonly uint64_t in_line
    cdef readonly uint64_t by_thread
    cdef readonly uint64_t abandoned
    cdef readonly uint64_t slow_submits
    # Each is made when it is first needed, because most
    # hubs do two or three kinds of things. NULL until then.
    cdef histogram *took[WAYS][DIRECTIONS]

    cdef histogram *histogram_of(self, int way, int direction) noexcept


cdef extern from *:
    int __builtin_clzll(unsigned long long)


cdef inline int bucket_of(uint64_t ns) noexcept:
    """Return the bucket of *ns*. A bucket is an eighth of a power of two wide, so its middle is at most a
    sixteenth away from any time in it."""
    cdef int octave, index
    # Below 16 ns each bucket is one ns wide. This also keeps 0 from `__builtin_clzll`, whose result is not
    # defined for 0, and the shift below from being negative.
    if ns < 16:
        return <int>ns
    # The octave is the number of the highest bit. The three bits below it choose one of its eight buckets.
    octave = 63 - __builtin_clzll(ns)
    index = ((octave - 2) << 3) + <int>(ns >> (octave - 3) & 7)
    return index if index < BUCKETS else BUCKETS - 1


# Here and not in _core/tally.pyx, because the engine calls
# it for each request: there the compiler puts it in line.
cdef inline void count_time(Tally tally, int way, int direction, uint64_t ns) noexcept:
    """Count one request that took *ns*. Without memory for a histogram it is not counted: a request must not
    fail because of its statistics."""
    cdef histogram *took = tally.took[way][direction]
    if took == NULL:
        took = tally.histogram_of(way, direction)
        if took == NULL:
            return
    took.total += ns
    if ns > took.longest:
        took.longest = ns
    took.counts[bucket_of(ns)] += 1
