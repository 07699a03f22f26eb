"""Losses of stage 1 that have networks of their own."""
