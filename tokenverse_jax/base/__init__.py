"""Trains a tiny FLUX pipeline: its autoencoder on pictures, then its transformer with both text encoders."""
