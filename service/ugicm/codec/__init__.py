"""The codec: networks, exact entropy coding, container, models on disk."""
