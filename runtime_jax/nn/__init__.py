"""Layers of both methods, and the dtype and attention that they compute with."""
