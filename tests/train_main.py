"""`vlmx train` as a program of its own, for tests that start or kill a process."""

import sys

from vlmx.train.command import train

train(sys.argv[1:], standalone_mode=False)
