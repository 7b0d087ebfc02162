"""What this machine reaches: the figures that plans are calibrated with."""
