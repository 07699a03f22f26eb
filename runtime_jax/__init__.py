"""The runtime of both methods: config, PRNG, sharding, checkpoints, data, the train loop, weights."""
