"""From scores to preferences: rewards of candidates, and weighted pairs of them."""
