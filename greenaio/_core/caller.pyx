# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The thread for which a worker makes a call, and what the worker borrows of it.

A call takes some things from the thread that makes it: fsuid and fsgid, capabilities, the umask. A worker
makes the call for another thread, and later. So `note_caller` writes these things down in the job, in the
caller's thread, and `begin_for` puts them on in the worker. A worker keeps them until the next job.

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
a default ACL it does not, so nothing else may.
"""

import posix            # `os` may be patched

from cpython.number cimport PyNumber_Index

cdef extern from *:
    """
    #include <linux/capability.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/fsuid.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <errno.h>
    #include <unistd.h>

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
    bint c_is_filtered "is_filtered"() noexcept nogil
    void c_note_caller "note_caller"(caller *one) noexcept nogil
    int put_on "act_for"(caller *one) noexcept nogil
    caller *acting_for
    bint has_first_permitted
    long mode_for_caller(long mode) noexcept nogil
    void count_umask_change() noexcept
    unsigned int umask_now
    int c_take_signal "take_signal"(long result) noexcept nogil


cdef bint is_filtered() noexcept nogil:
    """Return whether this thread is under a seccomp filter."""
    return c_is_filtered()


cdef void note_caller(caller *one) noexcept:
    """Write down what a call takes from this thread, which asks for it."""
    c_note_caller(one)


cdef int begin_for(caller *one) noexcept nogil:
    """Give this worker the ids and capabilities of the caller. Return 0, or minus the errno: then the worker must
    not make the call."""
    return put_on(one)


cdef void act_for(caller *one) noexcept nogil:
    """From now on files are created with the umask of *one*, or of the process if it is NULL."""
    global acting_for
    acting_for = one


cdef long creation_mode(long mode) noexcept nogil:
    """Return the *mode* with which a worker creates a file for its caller, whose umask may have been another."""
    return mode_for_caller(mode)


cdef int take_signal(long result) noexcept nogil:
    """Return the signal that a call with this *result* has sent to the worker, which blocks it; or 0."""
    return c_take_signal(result)


cdef void forget_first_permitted() noexcept:
    """Look again, at the next call, which capabilities the process begins with."""
    global has_first_permitted
    has_first_permitted = False


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
