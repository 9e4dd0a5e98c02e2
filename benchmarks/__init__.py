"""Benchmarks: ratios from interleaved runs in one process, medians, JSON with versions. Never part of the tests."""
