"""Tables: no number is ever cut, however narrow the terminal."""

import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

from vlmx.console import table

NAME = "many0_2026-11-22_sweep-of-learning-rates-1e-4"
SHOW = f"""
from vlmx.console import table
table(["run", "VQA", "paired"], [["{NAME}", "66.19†", "+1.62 [-3.00, +2.20]"], ["b", "100.00", "-"]])
"""


def test_where_nobody_looks_a_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    remarks = "a remark that is long " * 20
    table(["run", "VQA", "remarks"], [[NAME, "66.19", remarks]])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "VQA", "remarks"]
    assert row.rstrip() == f"{NAME}  66.19  {remarks}".rstrip()


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_on_a_narrow_terminal_text_is_folded_and_numbers_are_whole(columns: int) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "dumb"}
    subprocess.run([sys.executable, "-c", SHOW], stdout=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "66.19†  +1.62 [-3.00, +2.20]" in shown
    assert "…" not in shown
    assert NAME[:32] in shown
    assert NAME[-10:] in shown
