"""The specification of every op in plain PyTorch, for any float dtype."""
