"""Benchmarks of other vision tasks: their published files, what models see in restorations, how that is measured."""
