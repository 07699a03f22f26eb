"""Quantizers: their common interface, and look-up-free quantisation (LFQ)."""
