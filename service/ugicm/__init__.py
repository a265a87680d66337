"""Neural image codec for people and machines, and the service around it."""

__version__ = "0.1.0"
