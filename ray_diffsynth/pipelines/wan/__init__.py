"""Wan 2.1: text to video and image to video."""
