"""Tick for so many seconds beside a process that is tested; print the longest delay: the machine's."""

import sys
import time

end, worst = time.monotonic() + float(sys.argv[1]), 0.0
while (now := time.monotonic()) < end:
    time.sleep(0.001)
    worst = max(worst, time.monotonic() - now - 0.001)
print(worst)
