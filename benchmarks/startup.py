"""How long does `vlmx --help` take? Prints the median of whole processes, beside an interpreter that does nothing.

.venv/bin/python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 15


def median_s(*command: str) -> float:
    """Median wall seconds of running `command`."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    median_s("-m", "vlmx", "--help")  # the first run compiles bytecode
    empty_s, help_s = median_s("-c", "pass"), median_s("-m", "vlmx", "--help")
    print(f"python -c pass {empty_s:.3f} s   vlmx --help {help_s:.3f} s   ratio {help_s / empty_s:.1f}")
