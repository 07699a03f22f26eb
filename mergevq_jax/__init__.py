"""MergeVQ in JAX/Flax: an image tokenizer that merges tokens, quantises without a codebook and recovers positions."""
