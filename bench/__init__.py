"""Benchmarks: what each scenario costs in time and memory, beside other programs on the same data. See README.md."""
