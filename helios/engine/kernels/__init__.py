"""The compiled kernels of the CPU, and the threads that run them."""
