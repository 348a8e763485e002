# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The thread for which a worker makes a call, and the attributes that the worker takes over from it.

A call takes some attributes from the thread that makes it: fsuid and fsgid, capabilities, the umask. A worker
makes the call for another thread, and later. So `note_caller` writes these attributes down in the job, in the
caller's thread, and `begin_for` puts them on in the worker. A worker keeps them until the next job.
"""

# `os` may be patched.
import posix

from cpython.number cimport PyNumber_Index

cdef extern from *:
    """
    #include <linux/capability.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/fsuid.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <time.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <errno.h>
    #include <unistd.h>

    /* The hub's side changes this with the GIL. Workers read it at any time, so its changes and
       their loads are atomic. */
    static unsigned umask_changes;
    static unsigned creating;           /* workers */
    static __thread int is_creating;    /* whether this worker counts in it */
    static unsigned umask_now;          /* with the GIL */
    /* The permitted capabilities of the process when it first made a call. Guarded by the GIL. */
    static uint64_t first_permitted;
    static int has_first_permitted;

    /* Version 3 of the kernel's structure splits each set into two words of 32 bits. */
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

    /* capset wants all three sets, so the other two are read before and written back. */
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

    /* Under a filter setfsuid may end the process. A new file belongs to the fsuid and fsgid of the thread
       that makes it, so it tells them without that call. Return whether they were found. */
    static int read_ids(struct caller *one)
    {
        struct stat made;
        int fd = memfd_create("greenaio", MFD_CLOEXEC);
        int found = fd >= 0 && fstat(fd, &made) == 0;
        if (fd >= 0)
            close(fd);
        /* memfd_create makes a file in memory, so no disk is asked. */
        if (found) {
            one->fsuid = made.st_uid;
            one->fsgid = made.st_gid;
        }
        return found;
    }

    /* Return whether this thread is under a seccomp filter. */
    static int is_filtered(void)
    { return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) > 0; }

    /* Write down, in the thread that asks, all that the worker needs. With the GIL. */
    static void note_caller(struct caller *one)
    {
        uint64_t permitted = 0;
        one->umask_changes = umask_changes;
        one->umask = umask_now;
        one->effective = 0;
        /* An error leaves both sets empty, and `act_for` finds out by itself. */
        get_capabilities(&one->effective, &permitted);
        if (!has_first_permitted) {
            first_permitted = permitted;
            has_first_permitted = 1;
        }
        one->is_filtered = is_filtered();
        if (one->is_filtered)
            /* A difference shows that this thread was changed since the process began, so its ids may be,
               too. */
            one->has_ids = (one->effective != permitted || permitted != first_permitted) && read_ids(one);
        else {
            one->fsuid = setfsuid(-1);
            one->fsgid = setfsgid(-1);
            one->has_ids = 1;
        }
    }

    /* These four variables are the worker's own. This one is NULL outside of a worker's call. */
    static __thread struct caller *acting_for;
    /* Under a filter the worker has put on other ids than the process has. */
    static __thread int has_foreign_ids;
    /* The worker's effective capabilities are fewer than its permitted ones. */
    static __thread int is_lowered;
    /* The worker's permitted capabilities, as far as it knows them. No set is equal to this first value. */
    static __thread uint64_t own_permitted = ~0ull;

    /* setfsuid and setfsgid report no error: they return the id before. If that is not the wanted one, the
       second call shows whether the first has worked. */
    static int put_on_ids(uid_t uid, gid_t gid)
    {
        /* The group is first, because a thread that has given up its fsuid may no longer change its group. */
        if (setfsgid(gid) != gid && setfsgid(-1) != gid)
            return -EPERM;
        return setfsuid(uid) != uid && setfsuid(-1) != uid ? -EPERM : 0;
    }

    /* Put the ids and capabilities of *one* on. Return 0, or minus the errno: then the call must not be
       made, because it would have the rights of another user. */
    static int act_for(struct caller *one)
    {
        uint64_t effective, wanted;
        uid_t uid = one->has_ids ? one->fsuid : geteuid();
        gid_t gid = one->has_ids ? one->fsgid : getegid();
        /* Effective ids belong to the whole process, and glibc keeps the fsuid equal to them. Only
           setfsuid makes a difference. */
        int is_foreign = one->is_filtered && one->has_ids && (uid != geteuid() || gid != getegid());
        /* The worker needs its capabilities back first, or it may not set the ids. */
        if (is_lowered) {
            if (get_capabilities(&effective, &own_permitted) < 0 || set_effective(own_permitted) < 0)
                return -EPERM;
            is_lowered = 0;
        }
        /* Under a filter the ids are set only if they are foreign, or were foreign at the last job. */
        if ((!one->is_filtered || is_foreign || has_foreign_ids) && put_on_ids(uid, gid) < 0)
            return -EPERM;
        has_foreign_ids = is_foreign;
        /* The usual case: the caller has all capabilities that the worker has, so none are asked for or
           set. */
        if (one->effective == own_permitted)
            return 0;
        if (get_capabilities(&effective, &own_permitted) < 0)
            /* The sandbox denies the question. Then the caller's capabilities are not known either. */
            return 0;
        /* The worker can only lower its set. A capability that it was not born with stays missing. */
        wanted = one->effective & own_permitted;
        /* A worker that was started by a thread with a lowered set is born with one, and lowers nothing
           here. */
        is_lowered = wanted != own_permitted;
        return effective != wanted && set_effective(wanted) < 0 ? -EPERM : 0;
    }

    /* Return the mode with which a worker creates a file. See "umask" in the docstring of this module. */
    static long mode_for_caller(long mode, int may_create)
    {
        struct caller *one = acting_for;
        if (one == NULL)
            return mode;
        if (may_create && !is_creating) {
            is_creating = 1;
            __atomic_add_fetch(&creating, 1, __ATOMIC_SEQ_CST);
        }
        if (__atomic_load_n(&umask_changes, __ATOMIC_SEQ_CST) == one->umask_changes)
            return mode;
        return mode & ~(long)one->umask;
    }

    /* Release: `umask` goes on after the file is there. */
    static void end_creation(void)
    {
        if (is_creating) {
            is_creating = 0;
            __atomic_sub_fetch(&creating, 1, __ATOMIC_RELEASE);
        }
    }

    /* Count a change of the umask. Then wait until no worker creates a file by the old number, or for 1 ms. */
    static void count_umask_change(void)
    {
        struct timespec began, now, pause = { 0, 20000 };   /* ns */
        __atomic_add_fetch(&umask_changes, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&creating, __ATOMIC_SEQ_CST) == 0)
            return;
        clock_gettime(CLOCK_MONOTONIC, &began);
        do {
            /* The kernel adds its timer slack, usually 50 us. */
            nanosleep(&pause, NULL);
            clock_gettime(CLOCK_MONOTONIC, &now);
        } while (__atomic_load_n(&creating, __ATOMIC_SEQ_CST)
                 && (now.tv_sec - began.tv_sec) * 1000000000L + now.tv_nsec - began.tv_nsec < 900000);
    }

    /* In a forked child, whose workers stayed with the parent. */
    static void no_creation(void)
    { __atomic_store_n(&creating, 0, __ATOMIC_SEQ_CST); }

    /* Return the signal that a call has sent to the worker, or 0. A worker blocks all signals, so this one
       stays pending until it is taken here. It waits for no time. */
    static int take_signal(long result)
    {
        int number = result == -EFBIG ? SIGXFSZ : result == -EPIPE ? SIGPIPE : 0;
        struct timespec now = { 0, 0 };
        sigset_t one;
        /* Only these two errors come together with a signal. */
        if (number == 0)
            return 0;
        sigemptyset(&one);
        sigaddset(&one, number);
        return sigtimedwait(&one, NULL, &now) == number ? number : 0;
    }
    """
    # The functions are static in this module. Other modules call them through the Cython functions below.
    bint c_is_filtered "is_filtered"() noexcept nogil
    void c_note_caller "note_caller"(caller *one) noexcept nogil
    int put_on "act_for"(caller *one) noexcept nogil
    caller *acting_for
    bint has_first_permitted
    long mode_for_caller(long mode, bint may_create) noexcept nogil
    void end_creation() noexcept nogil
    void count_umask_change() noexcept
    void no_creation() noexcept nogil
    unsigned int umask_now
    int c_take_signal "take_signal"(long result) noexcept nogil


cdef bint is_filtered() noexcept nogil:
    """Return whether this thread is under a seccomp filter."""
    return c_is_filtered()


cdef void note_caller(caller *one) noexcept:
    """Write down the attributes that a call takes from this thread, which asks for it. With the GIL."""
    c_note_caller(one)


# fsuid and fsgid. setfsuid(-1) changes nothing and returns the present one. glibc changes these two in one
# thread only, and the other ids in all threads, workers included, by a signal that sigfillset leaves out.
# Such a change sets the fsuid of every thread again. So a worker does not remember its ids, it asks each
# time.
#
# capabilities. If the fsuid changes from 0 to another, a thread loses its capabilities on files, in the
# caller and in the worker alike. capset also changes one thread only. The worker lowers its effective set to
# the caller's. It can't have a capability that it was not born with.
#
# A seccomp filter may end the process at setfsuid: systemd's ``SystemCallFilter=~@privileged`` does. Under a
# filter nothing is set that need not be, and the ids are read off a new file. That takes 3 us, so they are
# read only where the capabilities show that this thread is not as the process began.
cdef int begin_for(caller *one) noexcept nogil:
    """Give this worker the ids and capabilities of the caller. Return 0, or minus the errno. After an error
    the worker must not make the call."""
    return put_on(one)


cdef void act_for(caller *one) noexcept nogil:
    """Let this thread create files with the umask of *one* from now on, or with the umask of the process if
    it is NULL. Then its call is over."""
    global acting_for
    acting_for = one
    if one == NULL:
        end_creation()


cdef long creation_mode(long mode, bint may_create) noexcept nogil:
    """Return the *mode* with which a worker creates a file for its caller, whose umask may have been
    another. `umask` does not wait for a call that probably creates no file."""
    return mode_for_caller(mode, may_create)


cdef int take_signal(long result) noexcept nogil:
    """Return the signal that a call with this *result* has sent to the worker, which blocks it; or 0."""
    return c_take_signal(result)


cdef void forget_first_permitted() noexcept:
    """Look again, at the next call, at the capabilities that the process begins with."""
    global has_first_permitted
    has_first_permitted = False


cdef void forget_creations() noexcept:
    """Forget the files that workers are creating. They do it in the parent of this process."""
    no_creation()


cdef void _learn_umask(unsigned int mask) noexcept:
    """Remember the umask of the process. Each later job takes it along."""
    global umask_now
    umask_now = mask


def learn_umask():
    """Learn the umask before `umask` changes it, unless a sandbox denies both.

    The kernel tells the umask only to a thread that sets it.
    """
    try:
        # During that moment a file gets no bit too many. Another value could open a file to other users.
        mask = posix.umask(0o077)
    except OSError:
        return
    posix.umask(mask)
    _learn_umask(mask)


# umask. A worker shares it with the process. `os.umask`, patched, counts its changes before it makes them. A
# job knows the number of changes and the umask at its call. If the number has changed, the file that the
# worker creates gets no bit that the umask of the call forbids. If not, the kernel applies the umask. Below a
# directory with a default ACL the kernel ignores the umask, so this code must not apply it either.
#
#     the caller                         another thread                     the worker
#     notes: 3 changes, umask 022
#                                        counts: 4 changes
#                                        sets the umask to 0
#                                                                           sees 4 changes: applies 022 itself
#                                                                           creates the file
#
# A worker that has looked at the number, and is about to create the file, would create it with the new umask.
# So the worker counts in `creating` before it looks, until the file is there, and `umask` waits after its
# count until no worker creates a file. Each side writes before it reads, and both are sequentially
# consistent, so either the worker sees the new number or `umask` sees the worker. A disk may hang, so `umask`
# waits for at most 1 ms.
def umask(mask, /):
    """Set the umask as `os.umask` does, and return the one before. A file whose creation was asked for and
    has not begun gets no bit that the umask until now forbids. Take at most 1 ms."""
    # The count changes first. Otherwise a worker could create a file between the two, with the new umask and
    # without knowing of it. All of this keeps the GIL: a job that another thread begins in between would have
    # the new number and the old umask.
    count_umask_change()
    old = posix.umask(mask)
    _learn_umask(PyNumber_Index(mask) & 0o777)
    return old
