"""What a candidate would give: agreement, perplexity and time at every exit."""
