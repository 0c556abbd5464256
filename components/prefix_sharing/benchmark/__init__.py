"""Training steps of the same pairs in several formats, timed side by side."""
