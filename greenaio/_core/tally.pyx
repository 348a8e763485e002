# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Counters only grow, and each event is counted once: by the engine of the hub where it happened.

An engine is a `Tally`, so that counting is one addition to a field of its own. The counters of a process are
the sum of all its engines and of those whose hubs have ended; `Tally.add` makes that sum only when a program
asks for it. `greenaio._core.counters` says what each counter means.
"""

from libc.stdlib cimport calloc, free


def bounds_of(bucket):
    """Return the first number of ns that belongs to *bucket* of a histogram, and the first beyond it.

    This is the inverse of `bucket_of` in tally.pxd."""
    # The first eight buckets are one ns wide. The formula below would shift them by -1.
    if bucket < 8:
        return bucket, bucket + 1
    return (8 + bucket % 8) << (bucket // 8 - 1), (9 + bucket % 8) << (bucket // 8 - 1)


cdef class Tally:
    """Hold the counters and histograms of one engine, or of several that `add` has summed up.

    There is no lock, because all code that counts has the GIL. So has the code that adds the engines of other
    threads up, and it finds no counter half written."""

    def __dealloc__(self):
        cdef int way, direction
        for way in range(WAYS):
            for direction in range(DIRECTIONS):
                free(self.took[way][direction])

    cdef histogram *histogram_of(self, int way, int direction) noexcept:
        """Return the histogram of *way* and *direction*, which is made if there is none.

        Return NULL if there is no memory for it."""
        # calloc and not an object of Python's, because this runs between a look at the kernel and the moment
        # at which the lists of the engine are right. An allocation of an object may run a finalizer there.
        if self.took[way][direction] == NULL:
            self.took[way][direction] = <histogram *>calloc(1, sizeof(histogram))
        return self.took[way][direction]

    def add(self, Tally other not None):
        """Add the counters of *other*; return self."""
        cdef int way, direction
        # A new counter has to be added here as well.
        self.submitted += other.submitted
        self.completed += other.completed
        self.batches += other.batches
        self.in_line += other.in_line
        self.by_thread += other.by_thread
        self.abandoned += other.abandoned
        self.slow_submits += other.slow_submits
        for way in range(WAYS):
            for direction in range(DIRECTIONS):
                # No histogram is made for a kind of operation that the other tally never had. Without memory
                # for a histogram the times are lost, and the counters above are still right.
                if other.took[way][direction] != NULL:
                    add_times(self.histogram_of(way, direction), other.took[way][direction])
        return self

    def latency(self, int way, int direction):
        """Return the number of requests in each bucket, and the sum and the longest of all times, in ns.

        `bounds_of` tells the bounds of a bucket. *way* and *direction* are numbers of tally.pxd. Raises
        IndexError for others."""
        # `took` is an array of C, whose bounds no other code checks.
        if not (0 <= way < WAYS and 0 <= direction < DIRECTIONS):
            raise IndexError((way, direction))
        cdef histogram *took = self.took[way][direction]
        if took == NULL:
            return [0] * BUCKETS, 0, 0
        return [took.counts[i] for i in range(BUCKETS)], took.total, took.longest


cdef void add_times(histogram *mine, histogram *theirs) noexcept:
    """Add the times of *theirs* to *mine*, unless there was no memory for *mine*."""
    cdef int i
    if mine == NULL:
        return
    mine.total += theirs.total
    mine.longest = max(mine.longest, theirs.longest)
    for i in range(BUCKETS):
        mine.counts[i] += theirs.counts[i]
