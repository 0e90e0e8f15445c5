"""Pruned models: made smaller by what pruning left without use."""
