"""Qwen-Image: text to image, and image to image."""
