"""Classes of processors that kernels are compiled for: a file for each kind (`processor.TARGETS`)."""
