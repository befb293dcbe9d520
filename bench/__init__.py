"""Benchmarks and training runs; `python -m bench --help` lists them."""
