"""A FLUX-style pipeline: transformer with offsets of its modulation, autoencoder, text encoders, folders, sampling."""
