"""Measurements: ``benchmarks.run`` appends rows to ``results/``, ``benchmarks.report`` shows them."""
