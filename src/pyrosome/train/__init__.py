"""Training: recipes, data, the loop, and the state it leaves on disk."""
