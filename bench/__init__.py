"""Benchmarks behind decisions; each is a module to run with ``python -m``."""
