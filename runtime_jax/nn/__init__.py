"""Layers that both methods use, with their attention and dtype."""
