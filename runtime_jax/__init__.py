"""What both methods run on and neither is about: config, PRNG, sharding, checkpoints, data, the train loop, weights."""
