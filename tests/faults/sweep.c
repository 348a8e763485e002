/* Fails the N-th thing that greenaio asks of the kernel, or of the allocator; loaded by LD_PRELOAD.

   Only calls that come from greenaio's own modules count, and only those that can fail: a write to an eventfd
   and io_destroy of one's own context can't. What fails is not done at all. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unwind.h>

enum { OFF, CALLS, MEMORY };

static struct {
    atomic_int what, count, first, last, code;
} *now;                         /* shared with children, whose calls count as well */

__attribute__((constructor)) static void load(void)
{
    now = mmap(NULL, sizeof(*now), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void sweep_begin(int what, int first, int last, int code)
{
    now->count = 0;
    now->first = first;
    now->last = last;
    now->code = code;
    now->what = what;
}

void sweep_pause(void)
{
    now->what = OFF;
}

int sweep_end(void)             /* how many there were */
{
    now->what = OFF;
    return now->count;
}

static int is_ours(void *address)
{
    Dl_info info;
    return dladdr(address, &info) && info.dli_fname && strstr(info.dli_fname, "/greenaio/_");
}

static int due(int which)
{
    int n;
    if (now == NULL || now->what != which)
        return 0;
    n = ++now->count;
    return n >= now->first && n <= now->last;
}

static int refuse(void *caller)
{
    if (now == NULL || now->what != CALLS || !is_ours(caller) || !due(CALLS))
        return 0;
    errno = now->code;
    return 1;
}

#define CALLER __builtin_return_address(0)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

long syscall(long number, ...)
{
    static long (*real)(long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (!real)
        real = dlsym(RTLD_NEXT, "syscall");
    /* EAGAIN of a read is io's word for "nothing there yet": no error, and not for files. */
    /* A futex wakes and waits for memory: it does not fail, as that of the C library's own locks does not. */
    if (number != SYS_io_destroy && number != SYS_close && number != SYS_futex
        && (now == NULL || now->code != EAGAIN || number == SYS_io_setup || number == SYS_io_submit)
        && refuse(CALLER))
        return -1;
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int eventfd(unsigned n, int flags)
{
    return refuse(CALLER) ? -1 : ((int (*)(unsigned, int))dlsym(RTLD_NEXT, "eventfd"))(n, flags);
}

int madvise(void *address, size_t length, int advice)
{
    return refuse(CALLER) ? -1 : REAL(madvise)(address, length, advice);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return refuse(CALLER) ? MAP_FAILED
        : ((void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap64"))
            (address, length, protection, flags, fd, offset);
}

ssize_t pread64(int fd, void *buffer, size_t n, off_t offset)
{
    return refuse(CALLER) ? -1
        : ((ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64"))(fd, buffer, n, offset);
}

int openat64(int folder, const char *path, int flags, int mode)
{
    return refuse(CALLER) ? -1
        : ((int (*)(int, const char *, int, int))dlsym(RTLD_NEXT, "openat64"))(folder, path, flags, mode);
}

int fcntl64(int fd, int command, long argument)
{
    return refuse(CALLER) ? -1
        : ((int (*)(int, int, long))dlsym(RTLD_NEXT, "fcntl64"))(fd, command, argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    return refuse(CALLER) ? EAGAIN : REAL(pthread_create)(thread, attributes, run, argument);
}

/* Memory: calloc of our modules, and Python's allocators where the first module up the stack that is neither
   Python nor the C library is ours. */

void *__libc_calloc(size_t, size_t);

void *calloc(size_t n, size_t size)
{
    return now && now->what == MEMORY && is_ours(CALLER) && due(MEMORY) ? NULL : __libc_calloc(n, size);
}

typedef struct {
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *);
} allocator;

static allocator theirs[3];
static __thread int looking;

enum { OURS, SOMEBODYS, PYTHONS, HIDDEN, NEW_ROW, CALL };

static int whose(void *address)
{
    static __thread struct { void *address; int whose; } known[4096];      /* dladdr takes long */
    size_t i = (size_t)address / 2 % 4096;
    Dl_info info;
    if (known[i].address == address)
        return known[i].whose;
    known[i].address = address;
    if (!dladdr(address, &info) || !info.dli_fname)
        return known[i].whose = SOMEBODYS;
    if (strstr(info.dli_fname, "/greenaio/_"))
        return known[i].whose = OURS;
    if (!strstr(info.dli_fname, "python") || strstr(info.dli_fname, "-packages")
        || strstr(info.dli_fname, "lib-dynload"))
        return known[i].whose = SOMEBODYS;
    /* Python gives up where there is no memory for the MemoryError itself, and what Cython makes of a with
       statement crashes where there was none for the traceback. */
    if (info.dli_sname && (strstr(info.dli_sname, "EvalFrame") || !strcmp(info.dli_sname, "PyTraceBack_Here")
                           || !strcmp(info.dli_sname, "_PyErr_NormalizeException")
                           || !strcmp(info.dli_sname, "PyFrame_New")
                           || !strcmp(info.dli_sname, "PyCode_NewEmpty")))
        return known[i].whose = SOMEBODYS;
    return known[i].whose = !info.dli_sname ? HIDDEN
        : !strcmp(info.dli_sname, "_PyObject_GC_NewVar") ? NEW_ROW
        : !strcmp(info.dli_sname, "_PyFunction_Vectorcall") ? CALL : PYTHONS;
}

struct look {
    int frames, was, found;
};

/* Stops at the first that tells: beyond the frame in which greenlet has begun there is what others left. */
static _Unwind_Reason_Code look_at(struct _Unwind_Context *frame, void *at)
{
    struct look *look = at;
    if (look->frames++ < 2)     /* our own */
        return _URC_NO_REASON;
    look->was = look->found;
    look->found = whose((void *)_Unwind_GetIP(frame));
    /* The object of a Python frame. Where a function ends by an exception and there is no memory for the object
       of the frame below, Python 3.11 to 3.13 loses the exception (python/cpython#131173). The function that makes
       the object has no name. In Debian's Python the compiler put _PyObject_GC_NewVar into it, and
       _PyFunction_Vectorcall calls it. */
    if (look->found == HIDDEN ? look->was == NEW_ROW : look->found == CALL && look->was == HIDDEN)
        look->found = SOMEBODYS;
    return look->found >= PYTHONS && look->frames < 16 ? _URC_NO_REASON : _URC_END_OF_STACK;
}

static int refuse_memory(void)
{
    struct look look = {0, PYTHONS, PYTHONS};
    if (now->what != MEMORY || looking)
        return 0;
    looking = 1;                /* it may allocate */
    _Unwind_Backtrace(look_at, &look);
    looking = 0;
    return look.found == OURS && due(MEMORY);
}

static void *our_malloc(void *at, size_t size)
{
    allocator *a = at;
    return refuse_memory() ? NULL : a->malloc(a->context, size);
}

static void *our_calloc(void *at, size_t n, size_t size)
{
    allocator *a = at;
    return refuse_memory() ? NULL : a->calloc(a->context, n, size);
}

static void *our_realloc(void *at, void *block, size_t size)
{
    allocator *a = at;
    return refuse_memory() ? NULL : a->realloc(a->context, block, size);
}

static void our_free(void *at, void *block)
{
    allocator *a = at;
    a->free(a->context, block);
}

void sweep_install(void)
{
    void (*get)(int, allocator *) = dlsym(RTLD_DEFAULT, "PyMem_GetAllocator");
    void (*set)(int, allocator *) = dlsym(RTLD_DEFAULT, "PyMem_SetAllocator");
    struct look look = {0, PYTHONS, PYTHONS};
    _Unwind_Backtrace(look_at, &look);  /* loads what it needs, now */
    for (int domain = 0; domain < 3; domain++) {
        allocator ours = {&theirs[domain], our_malloc, our_calloc, our_realloc, our_free};
        get(domain, &theirs[domain]);
        set(domain, &ours);
    }
}
