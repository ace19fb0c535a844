"""Set the wall clock of one test's processes while they run. The system's clock is not changed."""

import os
import shutil
import subprocess
from pathlib import Path

#: C source of a library that adds the number of seconds in CLOCK_FILE to the time of day. Monotonic clocks are not changed.
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long step_seconds(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_FILE"), O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += step_seconds();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    if (!failed) *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


class SteppedClock:
    """A clock for all processes that are started with `environment`. `set` changes their time of day while they run."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(_SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self._file = folder / "clock"
        self.set(0)
        self.environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file)}

    @staticmethod
    def is_available() -> bool:
        return shutil.which("cc") is not None

    def set(self, step_seconds: int) -> None:
        """Set the clock to the true time plus `step_seconds`."""
        aside = self._file.with_suffix(".new")
        aside.write_text(str(step_seconds))
        aside.replace(self._file)
