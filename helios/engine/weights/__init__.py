"""Turns the files of a checkpoint into weights that are ready to compute."""
