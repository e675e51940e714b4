"""Benchmarks: each is a command, `python -m benchmarks.NAME --help`. `python -m benchmarks` lists them."""
