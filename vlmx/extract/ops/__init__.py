"""Which numerical kernels do backbones share? Selective scans and linear layers. Importing it imports nothing else."""
