"""Class-conditional generators of a tokenizer's codes: MergeAR and its plain autoregressive baseline."""
