"""The HTTP service around the codec."""
