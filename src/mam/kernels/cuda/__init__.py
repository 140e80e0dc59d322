"""Kernels for NVIDIA GPUs. Each has its equal in plain JAX, which runs everywhere else."""
