"""The mechanism, its randomness and its price."""
