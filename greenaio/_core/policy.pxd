# The policies of the driver: how much it does before others go on, and which requests wait for each other.
#
# These are numbers and pure functions on C structures. No function here knows a request, a greenlet or the
# kernel, so each can be read, and changed, alone. They are in line in the modules that call them, because the
# driver asks them for every request.

from libc.stdint cimport int64_t, uint64_t

# Budget ---------------------------------------------------------------------------------------------
#
# One pass of the hub wakes at most `RUN_MAX` greenlets or works for `RUN_MAX_NS`. Then timers and sockets
# have their turn: a pass that drained to empty starved a timer of 1 ms. The bound of time includes real work,
# because what a woken greenlet does until it parks counts as well.
#
# Operations done inline cost less than a wake, so `HITS_MAX` of them are allowed. The clock would be a tenth
# of the price of a hit, so it is read once in `HITS_UNTIMED` of them.

cdef enum:
    RUN_MAX = 64
    HITS_MAX = 256
    HITS_UNTIMED = 8
    RUN_MAX_NS = 200000

cdef struct budget:
    # Wakes and operations done inline since the loop had its turn, and the time of the first, in ns.
    int run
    uint64_t began


cdef inline bint is_spent(budget *it, int limit, uint64_t now) noexcept:
    """Count one more. Return whether there were more than *limit*, or they took too long."""
    # The driver sets `run` to 0 when the loop has had its
    # turn. So the first call after that begins a new budget.
    if it.run == 0:
        it.began = now
    it.run += 1
    return it.run > limit or now - it.began > RUN_MAX_NS


# Batching -------------------------------------------------------------------------------------------
#
# A submission costs a system call and a doorbell (microseconds on a virtual disk), so requests wait for each
# other while the device has plenty to do: one may wait for each `LOAD_SHARE` in flight. With less in flight,
# waiting would let the device run dry.
#
# Outside of a pass a hub turn is short, and up to `BURST` requests that come together go together. A device
# that does everything inside the submission cannot run dry. There the greenlets that the pass wakes next
# share the system call.

cdef enum:
    LOAD_SHARE = 4
    BURST = 8


cdef inline int batch_limit(int in_flight, int waiting, int burst, bint is_instant) noexcept:
    """Return how many pending requests are worth a submission. *waiting* requests are pending or ready;
    *burst* is 0 in a pass."""
    # The device is idle, so a request goes out at once. On a device that does its work inside the submission
    # it waits, during a pass, for all requests that are about to come.
    if in_flight == 0:
        return waiting if is_instant and burst == 0 else 0
    return max(in_flight // LOAD_SHARE, burst)


# Polling --------------------------------------------------------------------------------------------
#
# A completion that comes within microseconds is cheaper to wait for than to sleep for. The time of the spin
# follows what it would have needed, as in QEMU's `aio_poll`: it begins with `POLL_MIN_NS`, doubles while the
# next completions would have been caught, and is halved when they come later than the limit allows.

cdef enum:
    POLL_MIN_NS = 4000

cdef struct polling:
    # The length of the next spin, and the time at which the last one ended in vain, in ns; 0: it did not.
    uint64_t spin_ns
    uint64_t unpolled_since


cdef inline void adapt(polling *it, uint64_t waited, uint64_t limit) noexcept:
    """Learn that a completion came *waited* ns after the end of a spin in vain."""
    it.unpolled_since = 0
    # The spin would have had to last `spin_ns + waited` to catch the completion. If that is beyond the limit,
    # spin less, and below the minimum not at all. If it is within the limit, spin longer the next time.
    if it.spin_ns + waited > limit:
        it.spin_ns = it.spin_ns // 2 if it.spin_ns // 2 >= POLL_MIN_NS else 0
    elif it.spin_ns:
        it.spin_ns = min(2 * it.spin_ns, limit)
    else:
        it.spin_ns = min(<uint64_t>POLL_MIN_NS, limit)
