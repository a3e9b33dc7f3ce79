"""Benchmarks of the installed software on the machine at hand."""
