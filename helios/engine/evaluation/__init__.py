"""What a candidate would give at every exit: agreement, perplexity, time and energy."""
