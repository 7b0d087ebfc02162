"""Official checkpoints: what should be in them, what is, and back to disk."""
