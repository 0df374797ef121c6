"""From the cache or the dataset to batches: epoch order, source, loader."""
