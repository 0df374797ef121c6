"""Stage 2: caches in, a trained LoRA out. Only ``job`` knows of Ray."""
