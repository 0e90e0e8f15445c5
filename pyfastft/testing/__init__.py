"""Sample arguments of every op and the tolerance policy, shared by tests and benchmarks."""
