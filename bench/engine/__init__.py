"""`helios bench engine` and `prefill`: the engine alone, without services."""
