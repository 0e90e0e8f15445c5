"""Benchmarks, installed as ``pyfastft.benchmarks``: ``pyfastft bench --help``.

A case is first held to the float64 reference, then timed beside its peers, all in one interleaved
run. ``bench_<family>.py`` says what is measured; the rest is shared:

    timer.py     the interleaving timer and its statistics
    probe.py     what the machine can do at best: arithmetic and memory
    machine.py   where a figure comes from: machine, versions, revision
    measure.py   case -> gate -> figures
    report.py    figures -> tables, CSV, plot, README
    bars.py      figures -> beside the targets in bars.toml
"""
