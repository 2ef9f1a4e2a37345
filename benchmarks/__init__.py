"""Benchmarks are code: they run at toy size inside the tests."""
