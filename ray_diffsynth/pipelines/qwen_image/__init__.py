"""Qwen-Image, and Qwen-Image-Edit on top of it."""
