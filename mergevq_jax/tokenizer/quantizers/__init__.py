"""From features to codes and indices: the record that the tokenizer knows, and look-up-free quantisation behind it."""
