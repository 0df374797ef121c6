"""From a metadata file to decoded, sized samples. No torch, no Ray."""
