"""Helios serves early-exit language models from the fewest layers that keep their quality."""

__version__ = "0.1.0"
