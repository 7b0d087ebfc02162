"""Small checkpoints in the official layout, for tests and for the built-in model."""
