"""What every family is made of: units, their graph, the split into stages, the base of pipelines."""
