"""Keys, accounts, what they may use and what they used: the door of a server for others than oneself."""
