"""Which numerical kernels do backbones share? The selective scan. Importing this package imports nothing else."""
