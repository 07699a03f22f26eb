"""A tiny FLUX pipeline from scratch: its autoencoder on pictures, then its transformer with both text encoders."""
