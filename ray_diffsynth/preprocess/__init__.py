"""Stage 1: run every unit that needs no gradient once, on Ray Data, and commit the results as a cache."""
