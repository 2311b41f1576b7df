"""`helios bench serve` and `served`: gateway and workers as their clients see them."""
