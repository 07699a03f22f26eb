"""The TokenVerse benchmark on mini_scenes, with the shipped tiny pipeline and judge.

tokenverse bench --config tokenverse_bench --workdir runs/bench            # 64 images, 4 seeds
tokenverse bench --config tokenverse_bench:demo --workdir runs/bench_demo  # a small version to try out
tokenverse bench --config tokenverse_bench:drawings --workdir runs/bench_drawings  # of benchmarks/drawings.py
"""

from ml_collections import ConfigDict

from runtime_jax.config import load

VARIANTS = {
    "full": {"images": 64, "seeds": 4},
    "demo": {"images": 8, "seeds": 2},
    "drawings": {"images": 16, "seeds": 4, "pictures": "runs/drawings", "rows": ["M+, per block, isolation"]},
}


def get_config(arg: str = "full") -> ConfigDict:
    """Learns as configs/tokenverse_tiny.py does."""
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}; there are {', '.join(VARIANTS)}")
    tiny = load("tokenverse_tiny").to_dict()
    return ConfigDict(
        {
            "model": tiny["model"],
            "size": tiny["size"],
            **VARIANTS[arg],
            "learn": tiny["learn"],
            "strengths": [0.5, 0.7, 1.0, 2.0],
            "sampling": tiny["sampling"] | {"cfg_scale": 4.0},
            "batch_size": 32,
        }
    )
