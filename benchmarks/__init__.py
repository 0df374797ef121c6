"""What is promised, measured: one file a claim; `python -m benchmarks.run` runs them all and prints one table."""
