"""What several families are made of: the bases of image and video families, their units, VAEs, tokens, texts."""
