# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Native threads make the system calls that native AIO can't: a bounded pool for each device.

A worker never takes the GIL and touches nothing of Python's. It gets a `job`, plain memory that hangs from a
Request; makes its one system call; and puts the job into the mailbox of the hub that asked. `Engine.lent` keeps
request, job and buffers until the hub has taken it out there. A pool starts a thread when there is more to do
than there are idle ones, and keeps it for as long as the process lives: starting and ending threads is a
latency spike of its own. A frozen disk fills its own pool and nobody else's.

A call that waits for a peer, such as the open of a FIFO, waits for no disk, and may do so for ever. It gets a
thread of its own from `lone_threads`, which ends afterwards.
"""

import logging
import os
import posix            # for what may be patched in os

from greenaio._core.bell import listen
from greenaio._config import config
from greenaio._core.engine import Opcode_name

from cpython.number cimport PyNumber_Index
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EACCES, EAGAIN, EINTR, ENOSYS, EPERM, errno as c_errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from greenaio._core.context cimport (
    FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV, Context, monotonic_ns, signal_eventfd,
)
from greenaio._core.engine cimport CALL, Engine, Request, iovec, new_request
from greenaio._core.tally cimport READ

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <linux/capability.h>
    #include <linux/futex.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/fsuid.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>

    #define WORKER_STACK (128 * 1024)   /* a system call needs little; the C library wants some for itself */

    static int start_worker(void *(*work)(void *), void *pool)
    {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        int error;
        sigfillset(&all);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, WORKER_STACK);
        pthread_sigmask(SIG_SETMASK, &all, &before);    /* inherited: signals are for Python's threads */
        error = pthread_create(&thread, &attributes, work, pool);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        return error;
    }

    /* What a worker borrows of the caller ----------------------------------------------------------------------

       A call takes some things from the thread that makes it: fsuid and fsgid, capabilities, the umask. A worker
       makes the call for another thread, and later. So `note_caller` writes these things down in the job, in the
       caller's thread, and `act_for` puts them on in the worker. A worker keeps them until the next job.

       fsuid and fsgid. setfsuid(-1) changes nothing and returns the present one. glibc changes these two in one
       thread only, and the other ids in all threads, workers included, by a signal that sigfillset leaves out.
       Such a change sets the fsuid of every thread again, so a worker trusts no memory of its own: it asks.

       capabilities. Setting the fsuid from 0 to another takes those on files away from a thread, in the caller and
       in the worker alike. capset also changes one thread only: the worker lowers its effective set as the caller
       has. It can't have what it was not born with.

       A seccomp filter may end the process at setfsuid: systemd's ``SystemCallFilter=~@privileged`` does. Under a
       filter nothing is set that need not be, and the ids are read off a new file. That takes 3 us; so they are
       read only where the capabilities show that this thread is not as the process began.

       umask. A worker shares it with the process. `os.umask`, patched, counts its changes before it makes them; a
       job knows the number and the umask at its call. If the number has changed, the file that the worker creates
       gets no bit that the umask of the call forbids. If not, the kernel applies the umask: below a directory with
       a default ACL it does not, so nothing else may. */

    struct caller {
        unsigned umask_changes;
        unsigned umask;
        uid_t fsuid;
        gid_t fsgid;
        int has_ids;                    /* fsuid and fsgid are known, and perhaps not those of the process */
        int is_filtered;
        uint64_t effective;             /* capabilities */
    };

    static unsigned umask_changes;      /* the hub's side changes it with the GIL; workers read it */
    static unsigned umask_now;          /* with the GIL */
    static uint64_t first_permitted;    /* capabilities; with the GIL */
    static int has_first_permitted;

    static int get_capabilities(uint64_t *effective, uint64_t *permitted)
    {
        struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2] = { { 0 } };
        if (syscall(SYS_capget, &head, data) < 0)
            return -1;
        *effective = data[0].effective | (uint64_t)data[1].effective << 32;
        *permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
        return 0;
    }

    static int set_effective(uint64_t effective)
    {
        struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2] = { { 0 } };
        if (syscall(SYS_capget, &head, data) < 0)
            return -1;
        data[0].effective = (uint32_t)effective;
        data[1].effective = (uint32_t)(effective >> 32);
        return (int)syscall(SYS_capset, &head, data);
    }

    static int read_ids(struct caller *one)
    {
        struct stat made;
        int fd = memfd_create("greenaio", MFD_CLOEXEC);
        int found = fd >= 0 && fstat(fd, &made) == 0;
        if (fd >= 0)
            close(fd);
        if (found) {
            one->fsuid = made.st_uid;
            one->fsgid = made.st_gid;
        }
        return found;
    }

    /* Whether this thread is under a seccomp filter. */
    static int is_filtered(void)
    { return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) > 0; }

    static void note_caller(struct caller *one)
    {
        uint64_t permitted = 0;
        one->umask_changes = umask_changes;
        one->umask = umask_now;
        one->effective = 0;
        get_capabilities(&one->effective, &permitted);
        if (!has_first_permitted) {
            first_permitted = permitted;
            has_first_permitted = 1;
        }
        one->is_filtered = is_filtered();
        if (one->is_filtered)
            one->has_ids = (one->effective != permitted || permitted != first_permitted) && read_ids(one);
        else {
            one->fsuid = setfsuid(-1);
            one->fsgid = setfsgid(-1);
            one->has_ids = 1;
        }
    }

    static __thread long own_domain;                /* 0: none; see `renew_threads` */

    static __thread struct caller *acting_for;      /* NULL but in a worker's call */
    static __thread int has_foreign_ids;            /* it has put on some under a filter */
    static __thread int is_lowered;                 /* its effective capabilities are fewer than the permitted */
    static __thread uint64_t own_permitted = ~0ull; /* as far as it knows: not yet */

    static int put_on_ids(uid_t uid, gid_t gid)
    {
        if (setfsgid(gid) != gid && setfsgid(-1) != gid)
            return -EPERM;
        return setfsuid(uid) != uid && setfsuid(-1) != uid ? -EPERM : 0;
    }

    /* 0, or minus the errno: then the call must not be made. */
    static int act_for(struct caller *one)
    {
        uint64_t effective, wanted;
        uid_t uid = one->has_ids ? one->fsuid : geteuid();
        gid_t gid = one->has_ids ? one->fsgid : getegid();
        int is_foreign = one->is_filtered && one->has_ids && (uid != geteuid() || gid != getegid());
        if (is_lowered) {               /* or it may not set the ids */
            if (get_capabilities(&effective, &own_permitted) < 0 || set_effective(own_permitted) < 0)
                return -EPERM;
            is_lowered = 0;
        }
        if ((!one->is_filtered || is_foreign || has_foreign_ids) && put_on_ids(uid, gid) < 0)
            return -EPERM;
        has_foreign_ids = is_foreign;
        if (one->effective == own_permitted)
            return 0;
        if (get_capabilities(&effective, &own_permitted) < 0)
            return 0;                   /* denied: then the caller's are not known either */
        wanted = one->effective & own_permitted;
        is_lowered = wanted != own_permitted;       /* so it may have been born, by a thread that was */
        return effective != wanted && set_effective(wanted) < 0 ? -EPERM : 0;
    }

    /* The mode with which a worker creates a file. */
    static long mode_for_caller(long mode)
    {
        struct caller *one = acting_for;
        if (one == NULL || __atomic_load_n(&umask_changes, __ATOMIC_ACQUIRE) == one->umask_changes)
            return mode;
        return mode & ~(long)one->umask;
    }

    static void count_umask_change(void)
    { __atomic_add_fetch(&umask_changes, 1, __ATOMIC_RELEASE); }

    /* Between the hub and a worker ------------------------------------------------------------------------

       The worker                                       The hub
       goes to rest: into `pool.resting`, `word` AT_WORK
       pushes the job that it has done
       wakes the hub, if that does not look
                                                        takes the job
                                                        queues the next, takes the worker out of `resting`
                                                        CALLED
       sees CALLED: it need not sleep, and goes on

       So one worker answers a greenlet that makes one short call after another. A worker that sees no call
       in time puts ASLEEP there and sleeps, until the hub puts CALLED there and wakes it. It comes back
       from rest only after that, and its `word`, on its stack, lives until then. The futex call needs an
       address only. */

    enum { AT_WORK, CALLED, ASLEEP };

    static void rest(int *word)
    {
        int expected = AT_WORK;
        if (__atomic_compare_exchange_n(word, &expected, ASLEEP, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == ASLEEP)
                syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, ASLEEP, NULL, NULL, 0);
    }

    static void call_to_work(int *word)
    {
        if (__atomic_exchange_n(word, CALLED, __ATOMIC_ACQ_REL) == ASLEEP)
            syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }

    static int is_asleep(int *word)
    { return __atomic_load_n(word, __ATOMIC_RELAXED) == ASLEEP; }

    /* Put *one*, whose link is *next*, on the stack. Return whether the stack was empty. There is no lock,
       because a worker that had it could lose its processor to the hub. */
    static int push(void **stack, void *one, void **next)
    {
        void *top = __atomic_load_n(stack, __ATOMIC_RELAXED);
        do
            *next = top;
        while (!__atomic_compare_exchange_n(stack, &top, one, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
        return top == NULL;
    }

    static void *pop_all(void **stack)
    { return __atomic_exchange_n(stack, NULL, __ATOMIC_ACQ_REL); }

    /* The hub says that it looks no more, and then looks once. The worker pushes, and then asks whether the
       hub looks. Of these two at least one sees what the other has done. */
    static void look_no_more(int *looks)
    {
        __atomic_store_n(looks, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    static int hub_looks(int *looks)
    {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return __atomic_load_n(looks, __ATOMIC_RELAXED);
    }

    /* The processor of a worker ---------------------------------------------------------------------------

       A call on what the kernel has in memory takes 1 to 10 us. To wake a thread on an idle processor takes
       5 to 50, because that has to be interrupted, and so does the way back. So for a call that is likely
       to be short the hub binds a worker that rests to its own processor. There the worker usually runs
       before the hub goes on: the hub finds the result at once, and no greenlet waits. If the call waits
       for a disk, the worker sleeps, and the hub goes on.

       Each hub makes one call at a time this way. A call that copies much or is likely to wait goes to a
       worker that may run on all processors, because the hub needs its own.

       The hub itself is never bound, because processes and threads that it starts inherit its processors. A
       worker starts none.

       A worker that was free to run on all processors of its cpuset gets back all that there may ever be,
       because the set may have grown. A worker that the user restricted gets back the processors it had. If
       the user has changed those of the worker or of the whole process since then, they stay as they are.

       A seccomp filter may end the process at sched_setaffinity: systemd's ``SystemCallFilter=~@resources``
       does. No call tells. So where the process is under filters when this module is imported, a child
       tries it. Under other filters than those no worker is bound. */

    struct place {
        pid_t thread;
        int cpu;                        /* to which it is bound, or -1 */
        int is_restricted;              /* by the user, before it was bound, to ... */
        cpu_set_t cpus;                 /* ... these */
    };

    static int set_cpus(pid_t thread, const cpu_set_t *cpus)
    { return sched_setaffinity(thread, sizeof *cpus, cpus) < 0 ? -errno : 0; }

    static int get_cpus(pid_t thread, cpu_set_t *cpus)
    { return sched_getaffinity(thread, sizeof *cpus, cpus) < 0 ? -errno : 0; }

    static int is_only(int cpu, const cpu_set_t *cpus)
    { return CPU_COUNT(cpus) == 1 && CPU_ISSET(cpu, cpus); }

    /* A thread with another policy, such as SCHED_FIFO, may leave a worker on its processor no time. */
    static int is_ordinary(void)
    {
        int policy = sched_getscheduler(0);
        return policy == SCHED_OTHER || policy == SCHED_BATCH;
    }

    /* Note a worker that has the processors *now*, to which it was not bound. If these are all of its
       cpuset, the user has not restricted it, and it gets all that there may ever be. */
    static int note_place(struct place *at, const cpu_set_t *now)
    {
        cpu_set_t all;
        int error;
        at->cpu = -1;
        at->cpus = *now;
        memset(&all, 255, sizeof all);
        if ((error = set_cpus(at->thread, &all)) < 0 || (error = get_cpus(at->thread, &all)) < 0)
            return error;
        at->is_restricted = !CPU_EQUAL(now, &all);
        return at->is_restricted ? set_cpus(at->thread, now) : 0;
    }

    /* Bind a worker that rests to *cpu*, where this thread is. Return 0, or minus an errno: EAGAIN if it is
       not to be bound at present. */
    static int bind_worker(struct place *at, int cpu)
    {
        cpu_set_t now, one;
        int error;
        if (!is_ordinary())
            return -EAGAIN;
        if ((error = get_cpus(at->thread, &now)) < 0)
            return error;
        if (at->cpu < 0 || !is_only(at->cpu, &now)) {
            if ((error = note_place(at, &now)) < 0)
                return error;
            if (CPU_COUNT(&now) == 1 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &now))
                return -EAGAIN;
        }
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if ((error = set_cpus(at->thread, &one)) == 0)
            at->cpu = cpu;
        return error;
    }

    /* A hub whose thread has other ids than the worker may not: then this is bound still, and does it itself. */
    static void release_worker(struct place *at)
    {
        cpu_set_t now, process;
        if (get_cpus(at->thread, &now) < 0)
            return;
        if (!is_only(at->cpu, &now) || (get_cpus(getpid(), &process) == 0 && is_only(at->cpu, &process))) {
            note_place(at, &now);
            return;
        }
        memset(&now, 255, sizeof now);
        if ((at->is_restricted && set_cpus(at->thread, &at->cpus) == 0) || set_cpus(at->thread, &now) == 0)
            at->cpu = -1;
    }

    static int filters_tried;           /* seccomp filters under which a child could bind itself; 0: none */

    /* How many seccomp filters this thread is under, or -1 where that is not known. */
    static int count_filters(void)
    {
        char text[4096], *line;
        int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
        if (fd >= 0)
            close(fd);
        if (n < 0)
            return -1;
        text[n] = 0;
        line = strstr(text, "Seccomp_filters:");
        return line == NULL ? -1 : atoi(line + strlen("Seccomp_filters:"));
    }

    /* The child shares no memory, its end sends no signal, and it leaves no core. */
    static void try_filters(void)
    {
        int status = -1;
        long child;
        if (!is_filtered())
            return;
        child = syscall(SYS_clone, 0L, 0L, 0L, 0L, 0L);
        if (child == 0) {
            cpu_set_t cpus;
            prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
            syscall(SYS_exit_group,
                    sched_getscheduler(0) < 0 || get_cpus(0, &cpus) < 0 || set_cpus(0, &cpus) < 0);
        }
        if (child < 0)
            return;
        while (waitpid((pid_t)child, &status, __WALL) < 0 && errno == EINTR)
            ;
        if (status == 0)
            filters_tried = count_filters();
    }

    /* Whether this thread may ask for, and change, the processors of a thread. */
    static int filters_allow(void)
    { return !is_filtered() || (filters_tried > 0 && count_filters() == filters_tried); }

    /* The signal that a call has sent to the worker, which blocks it; or 0. */
    static int take_signal(long result)
    {
        int number = result == -EFBIG ? SIGXFSZ : result == -EPIPE ? SIGPIPE : 0;
        struct timespec now = { 0, 0 };
        sigset_t one;
        if (number == 0)
            return 0;
        sigemptyset(&one);
        sigaddset(&one, number);
        return sigtimedwait(&one, NULL, &now) == number ? number : 0;
    }
    """
    const int INT_MAX
    int start_native "start_worker"(void *(*work)(void *) noexcept nogil, void *arg)
    struct caller:
        bint is_filtered
    void note_caller(caller *one) noexcept nogil
    int act_for(caller *one) noexcept nogil
    caller *acting_for
    long own_domain
    bint has_first_permitted
    long mode_for_caller(long mode) noexcept nogil
    void count_umask_change() noexcept
    unsigned int umask_now
    int take_signal(long result) noexcept nogil
    int AT_WORK
    void rest(int *word) noexcept nogil
    void call_to_work(int *word) noexcept nogil
    bint is_asleep(int *word) noexcept nogil
    bint push(void **stack, void *one, void **next) noexcept nogil
    void *pop_all(void **stack) noexcept nogil
    void look_no_more(int *looks) noexcept nogil
    bint hub_looks(int *looks) noexcept nogil
    int atomic_add "__atomic_add_fetch"(int *count, int n, int order) noexcept nogil
    const int ACQ_REL "__ATOMIC_ACQ_REL"
    struct place:
        int thread
        int cpu
    int bind_worker(place *at, int cpu) noexcept nogil
    void release_worker(place *at) noexcept nogil
    void try_filters() noexcept nogil
    bint filters_allow() noexcept nogil
    int sched_getcpu() noexcept nogil
    bint is_ordinary() noexcept nogil
    const long SYS_gettid
    int c_raise "raise"(int number) noexcept nogil
    long syscall(long number, ...) nogil
    const long SYS_openat
    const long SYS_read
    const long SYS_write
    const long SYS_pread64
    const long SYS_pwrite64
    const long SYS_newfstatat
    const long SYS_ftruncate
    const long SYS_fallocate
    const long SYS_copy_file_range
    const long SYS_sendfile
    const long SYS_lseek
    const long SYS_ioctl
    const long SYS_readahead
    const long SYS_sync_file_range
    const long SYS_readv
    const long SYS_writev
    const long SYS_preadv
    const long SYS_pwritev
    const long SYS_preadv2
    const long SYS_pwritev2
    const long SYS_fsync
    const long SYS_fdatasync
    int posix_fallocate(int fd, long offset, long length) nogil
    const int O_CREAT
    const int O_TMPFILE

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *cond, void *attributes)
    int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
    int pthread_cond_signal(pthread_cond_t *cond)

cdef enum:
    WARY = 16                   # calls by threads that have to be quick
    LONE_KEPT = 4               # idle threads of `lone_threads`, for opens that wait briefly
    LONG = 0                    # a call that may copy much or is likely to wait
    ON_NAMES = 1                # calls that are likely to be short: they look up names ...
    ON_BYTES = 2                # ... or write a few bytes ...
    ON_CLOSE = 3                # ... or close a file
    KINDS = 4
    SHORT_BYTES = 8192          # a write of more takes longer to copy than a worker to wake
    DOUBTED = 16                # calls of a kind that are taken for long after two in a row were
    WHEREVER = -1               # instead of a processor: a worker wherever it is ...
    EVERYWHERE = -2             # ... or one that may run on all

cdef uint64_t SHORT_NS = 100000     # a call that takes longer gains little by being on the hub's processor

cdef struct job:
    job *next                   # in the queue of the pool, then in the mailbox
    job *previous
    pool *home
    bint waiting                # in the queue still; home's lock guards it
    mailbox *back
    void *request               # who keeps this memory; never touched by a worker
    long number                 # the system call ...
    long args[6]                # ... and what it gets
    long result                 # its answer, or minus the errno
    int signal                  # that it sent to who made it, or 0
    caller by                   # for whom it is made
    int kind                    # LONG or ON_...

cdef struct mailbox:
    pthread_mutex_t lock
    pthread_cond_t empty        # nobody has a job for it any more
    void *done                  # jobs for the hub to take, the last first
    int out                     # jobs that are in a queue or with a worker
    int short_out               # of those, the ones likely to be short; the hub's alone
    int looks                   # the hub is about to look at `done`, so need not be woken
    int eventfd                 # the hub's, which a job wakes; -1 when the hub is gone
    int same_eventfd
    long name                   # of the eventfd
    bint orphan                 # the Inbox is gone: the last job frees this

cdef struct worker:             # on the stack of its thread
    worker *next                # in `resting`
    int word                    # AT_WORK, CALLED or ASLEEP
    place at

cdef struct pool:
    pthread_mutex_t lock
    worker *resting             # the last to rest first
    job *first
    job *last
    int queued
    int idle                    # threads that wait for a job
    int threads
    int limit
    int bound                   # threads that are bound: one for each hub at most
    int kept                    # idle threads: one more ends; 0 once it is retired
    int doubted[KINDS]          # so many calls more of this kind are taken for long
    bint was_long[KINDS]        # the last of this kind was: another thread may have had the processor
    int wary                    # so many calls more take threads, for one made in the hub has waited
    pool *older                 # all pools, for any_busy

cdef pool *_newest = NULL
cdef pool *_retired = NULL              # to be used again, when their last thread has ended
cdef long _domains = 0                  # how many there were
cdef bint _told_of_no_thread = False

log = logging.getLogger('greenaio')


cdef int start_worker(void *(*work)(void *) noexcept nogil, void *arg) noexcept:
    """Start a native thread, with signals blocked; return 0 or an errno."""
    return start_native(work, arg)


# What runs in a worker ---------------------------------------------------------------------------

cdef void _unlink(pool *home, job *one) noexcept nogil:
    if one.previous != NULL:
        one.previous.next = one.next
    else:
        home.first = one.next
    if one.next != NULL:
        one.next.previous = one.previous
    else:
        home.last = one.previous
    one.waiting = False
    home.queued -= 1


cdef void _post(job *one) noexcept nogil:
    """Back to the hub that asked. Afterwards the job is the hub's, which may free it at once."""
    cdef mailbox *box = one.back
    cdef bint was_empty, forgotten
    was_empty = push(&box.done, one, <void **>&one.next)
    pthread_mutex_lock(&box.lock)
    # Under the lock, or the number may be another's by now.
    if was_empty and not hub_looks(&box.looks) and box.eventfd >= 0:
        signal_eventfd(box.eventfd, box.same_eventfd, box.name)
    forgotten = atomic_add(&box.out, -1, ACQ_REL) == 0
    if forgotten:
        pthread_cond_signal(&box.empty)
    forgotten = forgotten and box.orphan
    pthread_mutex_unlock(&box.lock)
    if forgotten:
        free(box)


cdef long _make(job *one) noexcept nogil:
    cdef long result
    if one.number == CHAIN:
        return (<chain>one.args[0])(<void *>one.args[1])
    if one.number == POSIX_FALLOCATE:   # the C library's, which can do without the file system's help
        return -posix_fallocate(<int>one.args[0], one.args[1], one.args[2])
    if one.number == SYS_openat and one.args[2] & (O_CREAT | O_TMPFILE):
        one.args[3] = mode_for_caller(one.args[3])
    result = syscall(one.number, one.args[0], one.args[1], one.args[2], one.args[3], one.args[4], one.args[5])
    return -c_errno if result < 0 else result


cdef long creation_mode(long mode) noexcept nogil:
    """The *mode* with which a worker creates a file for its caller, whose umask may have been another."""
    return mode_for_caller(mode)


cdef void _make_for_caller(job *one) noexcept nogil:
    global acting_for
    one.result = act_for(&one.by)
    if one.result == 0 or one.kind == ON_CLOSE:     # which needs nothing of the caller
        acting_for = &one.by
        one.result = _make(one)
        acting_for = NULL
    one.signal = take_signal(one.result)


cdef bint _takes_long(job *one) noexcept nogil:
    """Make the call. Return whether it took long."""
    cdef uint64_t began
    if one.kind == LONG:
        _make_for_caller(one)
        return True
    began = monotonic_ns()
    _make_for_caller(one)
    return monotonic_ns() - began > SHORT_NS


cdef void _learn(pool *home, int kind, bint took_long) noexcept nogil:
    """With the lock: a call of that kind was made."""
    if took_long and (home.was_long[kind] or home.doubted[kind]):
        home.doubted[kind] = DOUBTED
    home.was_long[kind] = took_long


cdef void _release(pool *home, worker *me) noexcept nogil:
    release_worker(&me.at)
    pthread_mutex_lock(&home.lock)
    home.bound -= me.at.cpu < 0
    pthread_mutex_unlock(&home.lock)


cdef void *_work(void *arg) noexcept nogil:
    """A worker goes to rest before it posts the job that it has done: see "Between the hub and a worker"."""
    cdef pool *home = <pool *>arg
    cdef worker me
    cdef job *one
    cdef job *done = NULL
    cdef bint rests = False, took_long = False
    cdef int kind = LONG
    me.at.thread, me.at.cpu = <int>syscall(SYS_gettid), -1
    while True:
        pthread_mutex_lock(&home.lock)
        if rests:
            home.idle -= 1
        if done != NULL:
            _learn(home, kind, took_long)
        one = home.first
        rests = one == NULL and home.idle < home.kept
        if one != NULL:
            _unlink(home, one)
        elif rests:
            home.idle += 1
            me.word, me.next, home.resting = AT_WORK, home.resting, &me
        else:
            home.threads -= 1
            home.bound -= me.at.cpu >= 0
        pthread_mutex_unlock(&home.lock)
        if done != NULL:
            _post(done)
            done = NULL
        if one != NULL:
            if me.at.cpu >= 0 and one.kind == LONG and filters_allow():
                _release(home, &me)
            kind, took_long = one.kind, _takes_long(one)
            done = one
        elif rests:
            rest(&me.word)
        else:
            return NULL


# What a request asks of a worker -----------------------------------------------------------------

cdef job *_job_of(Request request) except NULL:
    if request._job == NULL:
        request._job = calloc(1, sizeof(job))
        if request._job == NULL:
            raise MemoryError
        (<job *>request._job).request = <void *>request
    return <job *>request._job


cdef void _set(job *one, long a, long b, long c, long d, long e, long f) noexcept:
    one.args[0], one.args[1], one.args[2] = a, b, c
    one.args[3], one.args[4], one.args[5] = d, e, f


cdef Request new_call(int fd, keep, long number, long a=0, long b=0, long c=0, long d=0, long e=0, long f=0):
    """A request for the system call *number*, on *fd*; *keep* is what its pointers point into."""
    cdef Request request = new_request(CALL, fd, 0, 0, 1)
    cdef job *one = _job_of(request)
    request.keep = keep
    if number == SYS_pread64:
        request.direction = READ
    one.number = number
    one.kind = LONG
    _set(one, a, b, c, d, e, f)
    return request


cdef Request new_close(keep, chain call, void *arg):
    """A request for ``call(arg)``, which closes a file. It is made even if the greenlet that asks for it is killed."""
    cdef Request request = new_call(-1, keep, CHAIN, <long>call, <long>arg)
    request.name = 'close'
    request.must_run = True
    (<job *>request._job).kind = ON_CLOSE
    return request


cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short):
    """A request for ``calls(arg)``: several system calls, of which each may depend on the one before. It gets no
    GIL. *name* is that of the operation in `os`. It *is_short* if all it needs is likely to be in memory."""
    cdef Request request = new_call(fd, keep, CHAIN, <long>calls, <long>arg)
    request.name = name
    (<job *>request._job).kind = ON_NAMES if is_short else LONG
    return request


_NAMES = {
    SYS_openat: 'open', SYS_pread64: 'pread', SYS_newfstatat: 'stat', SYS_lseek: 'lseek',
    SYS_ioctl: 'ioctl', SYS_ftruncate: 'ftruncate', SYS_fallocate: 'fallocate', POSIX_FALLOCATE: 'posix_fallocate',
    SYS_copy_file_range: 'copy_file_range', SYS_sendfile: 'sendfile', SYS_readahead: 'readahead',
    SYS_sync_file_range: 'sync_file_range'}


def operation(Request request not None):
    """What the call of *request* is called in `os`, or nearly."""
    if request.opcode != CALL:
        return Opcode_name(request.opcode).lower()
    if request.name is not None:
        return request.name
    return _NAMES.get((<job *>request._job).number if request._job != NULL else 0, 'call')


cdef int as_call(Request request) except -1:
    """What native AIO would do with *request*, as a system call."""
    cdef job *one = _job_of(request)
    cdef int opcode = request.opcode
    cdef iovec *buffers = request._iovec
    cdef long count = request._count
    if opcode == FSYNC or opcode == FDSYNC:
        one.number = SYS_fsync if opcode == FSYNC else SYS_fdatasync
        one.kind = LONG
        one.args[0] = request.fd
        return 0
    cdef bint reading = opcode == PREAD or opcode == PREADV
    one.kind = ON_BYTES if not reading and request.nbytes <= SHORT_BYTES else LONG
    cdef bint in_order = request.offset == -1       # at the file's own position
    # A sandbox may deny the newer calls, so each request takes the oldest one that does it.
    if request.flags:
        one.number = SYS_preadv2 if reading else SYS_pwritev2
    elif count == 1:
        if reading:
            one.number = SYS_read if in_order else SYS_pread64
        else:
            one.number = SYS_write if in_order else SYS_pwrite64
        _set(one, request.fd, <long>buffers.iov_base, buffers.iov_len, request.offset, 0, 0)
        return 0
    elif in_order:
        one.number = SYS_readv if reading else SYS_writev
    else:
        one.number = SYS_preadv if reading else SYS_pwritev
    # The offset in two halves, of which a 64-bit kernel takes the first whole.
    _set(one, request.fd, <long>buffers, count, request.offset, 0, request.flags)
    return 0


cdef int64_t make_here(Request request) except? -4096:
    """The result of the call of *request*, made in this thread, which it blocks; or minus the errno."""
    cdef job *one = <job *>request._job
    cdef long result
    while True:
        with nogil:
            result = _make(one)
        if result != -EINTR:
            return result
        PyErr_CheckSignals()


cdef void _take_back(job *one) noexcept:
    atomic_add(&one.back.out, -1, ACQ_REL)
    if one.kind != LONG:
        one.back.short_out -= 1


cdef bint withdraw(Request request) noexcept:
    """Take *request* out of its pool's queue; False when a worker has it already."""
    cdef job *one = <job *>request._job
    cdef bint waiting
    if one == NULL or one.home == NULL:
        return False
    pthread_mutex_lock(&one.home.lock)
    waiting = one.waiting
    if waiting:
        _unlink(one.home, one)
    pthread_mutex_unlock(&one.home.lock)
    if waiting:
        _take_back(one)
    return waiting


cdef void _learn_umask(unsigned int mask) noexcept:
    global umask_now
    umask_now = mask


def learn_umask():
    """Learn the umask before `umask` changes it, unless a sandbox denies both."""
    try:
        mask = posix.umask(0o077)       # for that moment a file gets no bit too many
    except OSError:
        return
    posix.umask(mask)
    _learn_umask(mask)


def umask(mask, /):
    """`os.umask`. A file whose creation has been asked for and not begun gets no bit that the umask until now
    forbids."""
    count_umask_change()                # first: else a worker could create a file between the two
    old = posix.umask(mask)
    _learn_umask(PyNumber_Index(mask) & 0o777)
    return old


# The hub's side ----------------------------------------------------------------------------------

cdef class Inbox:
    """Where workers put what they have done for one hub; *context*'s eventfd wakes it."""

    def __cinit__(self, Context context):
        global _inboxes
        self._box = <mailbox *>calloc(1, sizeof(mailbox))
        if self._box == NULL:
            raise MemoryError
        pthread_mutex_init(&self._box.lock, NULL)
        pthread_cond_init(&self._box.empty, NULL)
        self._box.eventfd = context.own_eventfd
        self._box.same_eventfd = context.eventfd
        _inboxes += 1
        self._box.name = context.name

    def __dealloc__(self):
        global _inboxes
        cdef bint unused
        if self._box == NULL:
            return
        _inboxes -= 1
        pthread_mutex_lock(&self._box.lock)
        self._box.orphan = True
        self._box.eventfd = -1
        unused = self._box.out == 0
        pthread_mutex_unlock(&self._box.lock)
        if unused:
            free(self._box)

    cdef int reap(self, Engine engine) except -1:
        """mailbox → ready; resumes nobody. Return how many."""
        cdef job *one = NULL
        cdef job *last
        cdef job *following
        cdef int n = 0
        if self._box.done == NULL:      # who puts something there now signals afterwards
            return 0
        last = <job *>pop_all(&self._box.done)
        while last != NULL:             # in the order in which they were done
            following = last.next
            last.next = one
            one, last = last, following
        engine.reaps()
        while one != NULL:
            following = one.next
            if one.signal:
                c_raise(one.signal)     # as if this thread had made the call
            if one.kind != LONG:
                self._box.short_out -= 1
            if one.home != NULL and one.home.wary > 0 and engine._reaped_ns > (<Request>one.request).began:
                _waited(one.home, engine._reaped_ns - (<Request>one.request).began)
            engine._finish(<Request>one.request, one.result)
            one = following
            n += 1
        engine._reaped_ns = 0
        return n

    def put(self, Request request not None, long result):
        """Put *request* here, done with *result*, as a worker does; for a scripted pool."""
        cdef job *one = _job_of(request)
        one.result = result
        push(&self._box.done, one, <void **>&one.next)

    def stop_signalling(self):
        """The eventfd is about to be closed: wake nobody any more."""
        pthread_mutex_lock(&self._box.lock)
        self._box.eventfd = -1
        pthread_mutex_unlock(&self._box.lock)

    cdef int look(self, Engine engine) except -1:
        """`reap` after `submit`, if the call went to a worker on this processor: it may have run already."""
        if not self._box.looks:
            return 0
        look_no_more(&self._box.looks)
        return self.reap(engine)

    cdef wait(self):
        """Wait, without the GIL, until no worker has a job of ours."""
        with nogil:
            pthread_mutex_lock(&self._box.lock)
            while self._box.out:
                pthread_cond_wait(&self._box.empty, &self._box.lock)
            pthread_mutex_unlock(&self._box.lock)

    def forget(self):
        """In a forked child: the lock may be held for ever, and the workers are the parent's."""
        global _inboxes
        _inboxes -= 1
        self._box = NULL


_pools = {}                             # by device; kept for the life of the process


cdef class Pool:
    """The threads of one device, ``config.threads`` of them at most; without *device*, as many as there are
    calls."""

    def __cinit__(self, device):
        global _newest
        self.device = device
        self._pool = _used_pool()
        if self._pool == NULL:
            self._pool = <pool *>calloc(1, sizeof(pool))
            if self._pool == NULL:
                raise MemoryError
            pthread_mutex_init(&self._pool.lock, NULL)
        self._pool.kept = INT_MAX if device is not None else LONE_KEPT
        self._pool.wary = 0
        self._pool.older = _newest
        _newest = self._pool            # never freed: its threads wait on it, and a job may still name it

    @property
    def threads(self):
        """How many were started."""
        return self._pool.threads

    @property
    def queued(self):
        """How many calls wait for a thread."""
        return self._pool.queued

    cdef void beware(self) noexcept:
        """A call on this device has held the hub. The next ones take threads, until `WARY` more of them were quick
        than slow: an on-access scanner answers late, for what is cached as well."""
        self._pool.wary = WARY

    cdef bint is_wary(self) noexcept:
        """Whether calls that would be made in the hub had better take a thread."""
        return self._pool.wary > 0

    cdef bint all_busy(self) noexcept:
        """Whether a call would have to wait for a thread, or may wait without one."""
        return _all_busy(self._pool)

    cdef int busy(self) noexcept:
        """Calls that threads have, or are to have."""
        return _busy(self._pool)

    cpdef int submit(self, Request request, Inbox inbox) except -1:
        """Queue the call of *request*, first in, first out; return whether it is. Nothing is queued if there is no
        thread, and none can be started."""
        cdef pool *home = self._pool
        cdef job *one = <job *>request._job
        cdef bint more, failed = False
        cdef worker *called
        cdef int cpu = WHEREVER
        if self.device is None:
            one.kind = LONG
        home.limit = config.threads if self.device is not None else INT_MAX
        note_caller(&one.by)
        one.home, one.back, one.previous, one.next = home, inbox._box, NULL, NULL
        atomic_add(&inbox._box.out, 1, ACQ_REL)
        if one.kind == LONG:
            cpu = EVERYWHERE
        else:
            inbox._box.short_out += 1
            if inbox._box.short_out == 1:
                cpu = sched_getcpu()
                if home.bound and not one.by.is_filtered and not is_ordinary():
                    cpu = EVERYWHERE    # since it bound one
        pthread_mutex_lock(&home.lock)
        one.previous = home.last
        if home.last != NULL:
            home.last.next = one
        else:
            home.first = one
        home.last = one
        one.waiting = True
        home.queued += 1
        if cpu >= 0 and home.doubted[one.kind]:
            home.doubted[one.kind] -= 1
            cpu = EVERYWHERE
        called = _choose(home, one, cpu, home.threads < home.limit)
        more = called == NULL and home.threads < home.limit
        if more:
            home.threads += 1
        pthread_mutex_unlock(&home.lock)
        if more:
            error = start_native(_work, home)
            if error:
                pthread_mutex_lock(&home.lock)
                home.threads -= 1
                called = _choose(home, one, cpu, False)     # one that has hardly come to rest
                failed = called == NULL and (home.threads == 0 or self.device is None)
                pthread_mutex_unlock(&home.lock)
                if failed and withdraw(request):
                    _tell_of_no_thread(error)
                    return False
        if called != NULL:
            inbox._box.looks = cpu >= 0
            call_to_work(&called.word)
        return True


cdef bint _may_bind = True              # False: the kernel refuses it
cdef int _inboxes = 0                   # how many there are: one for each hub


cdef worker *_choose(pool *home, job *one, int cpu, bint may_start) noexcept:
    """Take a worker out of `resting` for the call of *one*, and bind it to *cpu*, or to none if that is
    EVERYWHERE. Return NULL if there is none; or if another *may_start*, and none that may run everywhere is
    asleep: one that is awake may wait for the processor of the hub."""
    cdef worker **link = &home.resting
    cdef worker **free = NULL
    cdef worker **bound = NULL
    cdef worker *it
    while link[0] != NULL and not (bound != NULL and bound[0].at.cpu == cpu):
        if link[0].at.cpu < 0:
            if free == NULL or cpu == EVERYWHERE and is_asleep(&link[0].word):
                free = link             # for a long call the one that has rested longest
        elif bound == NULL or link[0].at.cpu == cpu:
            bound = link
        link = &link[0].next
    cdef bint is_bound = cpu >= 0 and (home.bound >= _inboxes or bound != NULL and bound[0].at.cpu == cpu)
    link = bound if bound != NULL and is_bound or free == NULL else free
    if link == NULL or cpu == EVERYWHERE and may_start and (link == bound or not is_asleep(&link[0].word)):
        return NULL
    it = link[0]
    link[0] = it.next
    if it.at.cpu == cpu:
        return it
    home.bound -= it.at.cpu >= 0
    if cpu >= 0 and home.bound < _inboxes and _may_bind:
        _bind(home, it, one, cpu)
    elif cpu == EVERYWHERE and it.at.cpu >= 0 and filters_allow():
        release_worker(&it.at)
    home.bound += it.at.cpu >= 0
    return it


cdef void _bind(pool *home, worker *it, job *one, int cpu) noexcept:
    global _may_bind
    cdef int error = bind_worker(&it.at, cpu) if filters_allow() else -EAGAIN
    if error == -EPERM or error == -EACCES or error == -ENOSYS:
        _may_bind = False
    if error:
        home.doubted[one.kind] = DOUBTED        # try again later


cdef _tell_of_no_thread(int error):
    global _told_of_no_thread
    if not _told_of_no_thread:
        _told_of_no_thread = True       # first: a handler may write to a file
        log.warning("can't start a thread: %s. Calls that need one block their hub, until one can be started. "
                    'pids.max, ulimit -u?', os.strerror(error))


cdef void _waited(pool *home, uint64_t ns) noexcept:
    """A call that a thread made on this wary device took *ns*: count it. A device whose calls are mostly quick is not
    wary for long, even if one of many waits for its disk."""
    if ns <= WAITED_NS:
        home.wary -= 1
    elif home.wary < WARY:
        home.wary += 1


cdef bint _all_busy(pool *one) noexcept nogil:
    # Read without the lock: workers only make it better.
    return one.wary > 0 or one.limit > 0 and _busy(one) >= one.limit


cdef int _busy(pool *one) noexcept nogil:
    return one.queued + one.threads - one.idle


cdef bint any_busy() noexcept:
    """Whether some pool is all busy, or wary."""
    cdef pool *one = _newest
    while one != NULL:
        if _all_busy(one):
            return True
        one = one.older
    return False


cdef Pool pool_of(device):
    """The pool of *device*, an ``st_dev``: one for all hubs, or since `renew_threads` one for each."""
    key = (device, _domain()) if _domains else device
    found = _pools.get(key)
    if found is None:
        found = _pools[key] = Pool(device)
    return found


cdef Pool lone_threads():
    """The pool for calls that wait for something that is no disk: each has a thread of its own at once."""
    return pool_of(None)


# A thread is born with what its creator has: a Landlock domain, seccomp filters, namespaces, and more. So threads that
# one hub has started may do what another may not. Until `renew_threads` is called all hubs share threads, which is
# right where all hubs may do the same. From then on each hub has threads of its own, a *domain*, which it starts
# itself: so they have what it has. Its number belongs to the thread of the hub, and is never used again: the number
# of a thread would be.

cdef long _domain() noexcept:
    global own_domain, _domains
    if own_domain == 0:
        _domains += 1
        own_domain = _domains
    return own_domain


def renew_threads():
    """Let new native threads make the calls from now on, instead of the present ones.

    A native thread is born with the Landlock domain, the seccomp filters, the namespaces, the I/O priority and all
    else that the thread which started it had. Call this in a thread that has changed one of these for itself, after
    the change: its later calls are made by threads that begin as it is now. So are the calls of other threads,
    each by threads of its own.

    A present thread ends when it has made the calls that were asked for before. One that hangs in a call stays until
    the call returns."""
    global has_first_permitted
    has_first_permitted = False
    if _domains == 0:
        _domain()
        for pool in list(_pools.values()):
            _retire(pool)
        _pools.clear()
    else:
        end_own_threads()
        _domain()


def end_own_threads():
    """Let the threads that only this thread's hub uses end, because the hub does."""
    global own_domain
    if own_domain == 0:
        return
    for key in [key for key in _pools if key[1] == own_domain]:
        _retire(_pools.pop(key))
    own_domain = 0


cdef void _retire(Pool which) noexcept:
    global _newest, _retired
    cdef pool *one = which._pool
    cdef pool **link = &_newest
    while link[0] != one and link[0] != NULL:
        link = &link[0].older
    if link[0] == NULL:
        return
    link[0] = one.older
    one.older = _retired
    _retired = one
    cdef worker *called
    pthread_mutex_lock(&one.lock)
    one.kept = 0
    while one.resting != NULL:
        called = one.resting
        one.resting = called.next
        call_to_work(&called.word)
    pthread_mutex_unlock(&one.lock)


cdef pool *_used_pool() noexcept:
    """A retired pool without threads, or NULL. A job that it has done may still name it: its memory stays a pool."""
    global _retired
    cdef pool **link = &_retired
    cdef pool *one
    cdef bint is_over
    while link[0] != NULL:
        one = link[0]
        pthread_mutex_lock(&one.lock)
        is_over = one.threads == 0 and one.first == NULL
        pthread_mutex_unlock(&one.lock)
        if is_over:
            link[0] = one.older
            return one
        link = &one.older
    return NULL


def forgive():
    """Forget that calls on a device have waited in the hub."""
    for one in _pools.values():
        (<Pool>one)._pool.wary = 0


def pools():
    """Return all pools there are."""
    return list(_pools.values())


def _after_fork_in_child():
    """Start anew: the threads stayed with the parent, and may have held any lock."""
    global _newest, _retired, has_first_permitted
    _newest = _retired = NULL
    has_first_permitted = False
    _pools.clear()


try_filters()
listen(_after_fork_in_child)
