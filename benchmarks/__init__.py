"""Benchmarks: ratios between ways to compute the same thing, in one process."""
