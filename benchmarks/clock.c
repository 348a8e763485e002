/* For instructions.py: a clock that each look moves on by a microsecond, so that what is done when so much time
   has passed is the same in every run. */

#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now)
{
    static long ns;
    (void)id;
    ns += 1000;
    now->tv_sec = 1000 + ns / 1000000000;
    now->tv_nsec = ns % 1000000000;
    return 0;
}
