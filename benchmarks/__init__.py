"""Benchmarks: measurements of visadapt and its peers, each started with ``python -m benchmarks.<name>``."""
