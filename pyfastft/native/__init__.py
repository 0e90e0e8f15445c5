"""Adapters: from tensors to the C ABI's arguments, and nothing else."""
