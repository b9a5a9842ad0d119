"""Which script lets a Slurm cluster do an extraction as a job array?"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

WARNING_S = 120  # ahead of the end of its time a task is told: it needs as long as a shard takes

_SCRIPT = """\
#!/bin/bash
# Fills one cache with {tasks} tasks. Any number of them may run at a time, start late, or die: the others do the rest.
# Submit it with what your cluster needs, e.g.: sbatch --gpus=1 --cpus-per-task=8 --time=4:00:00 SCRIPT
#SBATCH --job-name=vlmx-extract
#SBATCH --array=0-{last}
#SBATCH --output=vlmx-extract-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning_s}

cd {folder} || exit 1
export VLMX_PART="$SLURM_ARRAY_TASK_ID/{tasks}"
{command} &
vlmx=$!

# SIGTERM lets vlmx finish the shard in hand and leave with 0. USR1 means that the time of this task is nearly over:
# it goes back into the queue and continues. TERM is scancel: it does not.
again=no
trap 'again=yes; kill -TERM "$vlmx"' USR1
trap 'kill -TERM "$vlmx"' TERM
wait "$vlmx"
while kill -0 "$vlmx" 2>/dev/null; do wait "$vlmx"; done # a signal had interrupted the wait
wait "$vlmx"
code=$?
if [ "$again" = yes ] && [ "$code" -eq 0 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def job_array(arguments: Sequence[str], tasks: int) -> str:
    """The script.

    Args:
        arguments: of `vlmx extract`, as they were given; --slurm itself is left out.
        tasks: how many tasks the array has.
    """
    return _SCRIPT.format(
        tasks=tasks,
        last=tasks - 1,
        warning_s=WARNING_S,
        folder=shlex.quote(os.getcwd()),
        command=shlex.join([sys.executable, "-m", "vlmx", "extract", *_without_slurm(arguments)]),
    )


def _without_slurm(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    before = ""
    for argument in arguments:
        number = before == "--slurm" and re.fullmatch(r"\d+", argument)
        if not number and argument.partition("=")[0] != "--slurm":
            kept.append(argument)
        before = argument
    return kept
