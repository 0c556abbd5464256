"""Log-probs under the reference: from the cache, from a pass before the first update, or from a frozen model."""
