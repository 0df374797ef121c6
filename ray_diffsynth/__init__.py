"""Two-stage LoRA training of diffusion transformers on a Ray cluster: encode once, then train from the cache."""

__version__ = "0.1.0"
