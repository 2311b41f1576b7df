"""What computes a step: compiled kernels on a CPU, torch elsewhere; and the keys and values they keep."""
