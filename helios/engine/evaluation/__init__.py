"""Evaluates a candidate at every exit: agreement, perplexity, time and energy."""
