"""Classes of processors that kernels are compiled for, one file per family (`processor.TARGETS`)."""
