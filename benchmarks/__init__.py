"""Benchmarks, installed as ``pyfastft.benchmarks``."""
