"""What will happen before anything is bought, fetched or loaded: bytes, sessions, speed, cost.  No torch is needed."""
