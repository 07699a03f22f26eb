"""TokenVerse: visual concepts as directions in the per-token modulation space of a FLUX-style diffusion transformer."""
