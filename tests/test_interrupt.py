"""Does the second signal end a command that hangs in a thread?"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

HANGS = """
import threading
from concurrent.futures import ThreadPoolExecutor
from vlmx.extract.interrupt import Interrupt
with Interrupt(fix="") as interrupt, ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(threading.Event().wait)
    print("ready", flush=True)
    while True:
        try:
            waiting.result(timeout=0.05)
        except TimeoutError:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_whatever_its_threads_wait_for(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "once more to stop at once" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
