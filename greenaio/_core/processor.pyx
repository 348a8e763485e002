# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The processor that a worker runs on: for a short call the processor of the hub.

A call that needs only memory takes 1 to 10 us. To wake a thread on an idle processor takes
5 to 50, because that has to be interrupted, and so does the way back. So for a call that is likely
to be short the hub binds a worker that rests to its own processor. There the worker usually runs
before the hub goes on: the hub finds the result at once, and no greenlet waits. If the call waits
for a disk, the worker sleeps, and the hub goes on.

Each hub makes one call at a time this way. A call that copies much or is likely to wait goes to a
worker that may run on all processors, because the hub needs its own.
"""

from greenaio._core.caller cimport is_filtered

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>

    /* Both return 0 or minus the errno. *thread* is a thread's id, not a process's, and 0 is this thread. */
    static int set_cpus(pid_t thread, const cpu_set_t *cpus)
    { return sched_setaffinity(thread, sizeof *cpus, cpus) < 0 ? -errno : 0; }

    static int get_cpus(pid_t thread, cpu_set_t *cpus)
    { return sched_getaffinity(thread, sizeof *cpus, cpus) < 0 ? -errno : 0; }

    /* Return whether *cpu* is the only processor in *cpus*. */
    static int is_only(int cpu, const cpu_set_t *cpus)
    { return CPU_COUNT(cpus) == 1 && CPU_ISSET(cpu, cpus); }

    /* Return whether this thread has an ordinary policy. A thread with another, such as SCHED_FIFO, may
       leave a worker on its processor no time. */
    static int is_ordinary(void)
    {
        /* Batch threads share the processor as ordinary ones do. */
        int policy = sched_getscheduler(0);
        return policy == SCHED_OTHER || policy == SCHED_BATCH;
    }

    /* Note a worker that has the processors *now*, to which it was not bound. If these are all of its
       cpuset, the user has not restricted it, and it gets all that there may ever be. Return 0 or minus an
       errno. */
    static int note_place(struct place *at, const cpu_set_t *now)
    {
        cpu_set_t all;
        int error;
        at->cpu = -1;
        at->cpus = *now;
        /* The kernel cuts this set down to the cpuset, which is how the cpuset becomes known. */
        memset(&all, 255, sizeof all);
        if ((error = set_cpus(at->thread, &all)) < 0 || (error = get_cpus(at->thread, &all)) < 0)
            return error;
        at->is_restricted = !CPU_EQUAL(now, &all);
        return at->is_restricted ? set_cpus(at->thread, now) : 0;
    }

    /* Bind a worker that rests to *cpu*, where this thread is. Return 0, or minus an errno: EAGAIN if it
       is not to be bound at present. */
    static int bind_worker(struct place *at, int cpu)
    {
        cpu_set_t now, one;
        int error;
        if (!is_ordinary())
            return -EAGAIN;
        /* The processors are asked for at each change, because the user may change them at any time. */
        if ((error = get_cpus(at->thread, &now)) < 0)
            return error;
        /* Either the worker is not bound, or the user has given it other processors since. Both need a
           fresh note. */
        if (at->cpu < 0 || !is_only(at->cpu, &now)) {
            if ((error = note_place(at, &now)) < 0)
                return error;
            /* With one processor there is nothing to choose. A processor that the user took from the
               worker stays taken. */
            if (CPU_COUNT(&now) == 1 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &now))
                return -EAGAIN;
        }
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if ((error = set_cpus(at->thread, &one)) == 0)
            at->cpu = cpu;
        return error;
    }

    /* Give a worker back the processors that it had. A hub whose thread has other ids than the worker may
       not do that. Then the worker stays bound, and does it itself. */
    static void release_worker(struct place *at)
    {
        cpu_set_t now, process;
        if (get_cpus(at->thread, &now) < 0)
            return;
        /* The user has changed the processors, of the worker or of the whole process, since it was bound.
           They stay. */
        if (!is_only(at->cpu, &now) || (get_cpus(getpid(), &process) == 0 && is_only(at->cpu, &process))) {
            note_place(at, &now);
            return;
        }
        /* If the noted processors are no longer to be had, all are better than one. */
        memset(&now, 255, sizeof now);
        if ((at->is_restricted && set_cpus(at->thread, &at->cpus) == 0) || set_cpus(at->thread, &now) == 0)
            at->cpu = -1;
    }

    /* The number of seccomp filters under which a child could bind itself. 0 if none was tried. */
    static int filters_tried;

    /* Return the number of seccomp filters that this thread is under, or -1 where it is not known. A
       thread that adds a filter has a larger number. */
    static int count_filters(void)
    {
        char text[4096], *line;
        int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
        if (fd >= 0)
            close(fd);
        if (n < 0)
            return -1;
        /* An older kernel writes no such line. There no worker is bound under a filter. */
        text[n] = 0;
        line = strstr(text, "Seccomp_filters:");
        return line == NULL ? -1 : atoi(line + strlen("Seccomp_filters:"));
    }

    /* Try the calls in a child, because a filter may end the process that makes them. The child shares no
       memory, its end sends no signal, and it leaves no core. */
    static void try_filters(void)
    {
        int status = -1;
        long child;
        /* The plain system call runs no handlers of fork, neither Python's nor the C library's. */
        child = syscall(SYS_clone, 0L, 0L, 0L, 0L, 0L);
        if (child == 0) {
            cpu_set_t cpus;
            prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
            syscall(SYS_exit_group,
                    sched_getscheduler(0) < 0 || get_cpus(0, &cpus) < 0 || set_cpus(0, &cpus) < 0);
        }
        if (child < 0)
            return;
        /* A child that sends no signal at its end is only waited for with __WALL. */
        while (waitpid((pid_t)child, &status, __WALL) < 0 && errno == EINTR)
            ;
        if (status == 0)
            filters_tried = count_filters();
    }

    /* Return whether a child has tried the filters of this thread. */
    static int are_filters_tried(void)
    { return filters_tried > 0 && count_filters() == filters_tried; }
    """
    int c_bind_worker "bind_worker"(place *at, int cpu) noexcept nogil
    void c_release_worker "release_worker"(place *at) noexcept nogil
    void try_filters() noexcept nogil
    bint are_filters_tried() noexcept nogil
    bint c_is_ordinary "is_ordinary"() noexcept nogil


# The hub itself is never bound, because processes and threads that it starts inherit its processors. A worker
# starts none.
#
# A worker that was free to run on all processors of its cpuset gets back all that there may ever be, because
# the set may have grown. A worker that the user restricted gets back the processors it had. If the user has
# changed the processors of the worker or of the whole process since then, they stay as they are.
cdef int bind_worker(place *at, int cpu) noexcept nogil:
    """Bind a worker that rests to *cpu*, where this thread is. Return 0, or minus an errno: EAGAIN if it is
    not to be bound at present."""
    return c_bind_worker(at, cpu)


cdef void release_worker(place *at) noexcept nogil:
    """Let a bound worker run on the processors that it had before. This thread may not do that if it has
    other ids than the worker. Then the worker stays bound, and does it itself."""
    c_release_worker(at)


cdef bint filters_allow() noexcept nogil:
    """Return whether this thread may ask for, and change, the processors of a thread."""
    return not is_filtered() or are_filters_tried()


cdef bint is_ordinary() noexcept nogil:
    """Return whether this thread has an ordinary policy. Another, such as SCHED_FIFO, may leave a worker on
    its processor no time."""
    return c_is_ordinary()


# A seccomp filter may end the process at sched_setaffinity: systemd's ``SystemCallFilter=~@resources`` does.
# No call tells. So where the process is under filters when this module is imported, a child tries it. Under
# other filters than those no worker is bound.
# Once, at import: see the docstring of this module.
if is_filtered():
    try_filters()
