"""Benchmarks: what is faster than what, each a ratio measured in one run."""
