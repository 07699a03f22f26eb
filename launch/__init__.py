"""Programs that start runs: on this machine, on TPU slices, on Kubernetes and on SLURM; and that compile them ahead."""
