"""The two text encoders of FLUX."""
