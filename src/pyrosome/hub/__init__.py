"""Fetching checkpoints: resumable, checked, and planned before the first gigabyte."""
