"""Published networks whose features losses and metrics read."""
