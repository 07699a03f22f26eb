"""Drawing codes: the settings, the samplers in raster order and in random order, and the KV cache."""
