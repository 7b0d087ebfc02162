"""The network: one definition, which serves, trains and is checked against the official vectors."""
