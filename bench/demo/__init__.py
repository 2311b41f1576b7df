"""`helios demo`: traffic drifts, and a stack follows it."""
