"""What each operation of the network means: plain-torch definitions, with faster versions beside them."""
