"""Other programs' weights, in both directions."""
