"""Training a codec, and measuring what it is worth."""
