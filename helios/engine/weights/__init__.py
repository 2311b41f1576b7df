"""From the files of a checkpoint to weights that are ready to compute."""
