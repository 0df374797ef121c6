"""Weights: find a model's files, load its parts, identify them, and move LoRA adapters in and out."""
