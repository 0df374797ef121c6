"""Whether a cluster's file is right, as far as another machine can tell: `python -m cluster.check FILE …`."""
