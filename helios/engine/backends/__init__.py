"""The backends that compute a step (compiled kernels on a CPU, torch elsewhere), and the KV cache."""
