"""The conformance kit: whether the weights at hand, and this machine, compute what they should."""
