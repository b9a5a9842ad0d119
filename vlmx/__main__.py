"""`python -m vlmx` is the `vlmx` command, for torchrun and for machines without scripts on the PATH."""

from vlmx.cli import main

if __name__ == "__main__":
    main()
