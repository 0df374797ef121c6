"""What several families are made of: the base of image families, their units, VAEs, tokens, texts."""
