"""The shipped tiny FLUX pipeline, trained on mini_scenes: 64 px, 64 image tokens; and its training on new scenes.

tokenverse train-base --config flux_tiny --workdir runs/flux_first
tokenverse train-base --config flux_tiny:more --workdir runs/flux_tiny        # goes on from the first
"""

from ml_collections import ConfigDict


def _optimizer(**values) -> dict:
    return {"schedule": "cosine", "final_fraction": 0.02, "b1": 0.9, "b2": 0.95, "clip_norm": 1.0} | values


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "more" goes on from a pipeline, `init_from`: new scenes, with more drawings and more words."""
    if arg not in ("", "more"):
        raise ValueError(f"no variant {arg!r}; there is more")
    config = _first()
    if arg == "more":
        config.update({"init_from": "runs/flux_first/pipeline", "seed": 3, "drawn": 0.5})
        config.vae.training.loop.duration.steps = 4000  # of the decoder alone
        stage = config.text_to_image
        stage.captions.update({"drop_t5": 0.2, "local": 0.3, "light": 0.6, "easy_steps": 0, "full_steps": 0})
        stage.training.optimizer.update({"learning_rate": 1.2e-3, "muon_learning_rate": 0.006})
        stage.training.loop.duration.steps = 7000
    return config


def _first() -> ConfigDict:
    return ConfigDict(
        {
            "task": "base",
            "seed": 0,
            "image_size": 64,
            "init_from": None,
            "vae": {
                "model": {
                    "block_out_channels": [16, 32, 64],
                    "layers_per_block": 1,
                    "latent_channels": 4,
                    # More groups, of fewer channels each, would remove an image's colours.
                    "norm_num_groups": 4,
                },
                "l2_weight": 1.0,
                # 1.5 nats per latent and 29 dB. At 1e-3 the transformer would have to model four times as many nats.
                "kl_weight": 1e-2,
                "training": {
                    "batch_size": 8,
                    "optimizer": _optimizer(
                        learning_rate=3e-3,
                        muon_learning_rate=0.02,
                        adam_kernels=["conv_in", "conv_out"],
                        warmup={"steps": 50},
                    ),
                    "ema_decay": 0.998,
                    "loop": {
                        "duration": {"steps": 2000},
                        "log_every": 50,
                        "checkpoint_every": 200,
                        "eval_every": 500,
                        "preview_every": 500,
                        "keep_checkpoints": 1,
                    },
                },
            },
            "num_scenes": 20_000,
            "drawn": 0.25,
            "text_to_image": {
                "flux": {
                    "in_channels": 16,
                    "num_layers": 2,
                    "num_single_layers": 4,
                    "attention_head_dim": 32,
                    "num_attention_heads": 4,
                    "joint_attention_dim": 128,
                    "pooled_projection_dim": 128,
                    "guidance_embeds": False,
                    "axes_dims_rope": [4, 14, 14],
                },
                "text_layers": 2,
                "text_heads": 4,
                "captions": {
                    "text_length": 40,
                    "drop_t5": 0.32,
                    "drop_clip": 0.32,
                    "local": 0.4,
                    "pair_every": 8,
                    # Words get their meaning several times faster with one object and full captions.
                    "easy_steps": 800,
                    "full_steps": 3500,
                    "object_weights": [0.3, 0.7],
                },
                # Positions and colours are decided at high noise, outlines and textures at half of it.
                "time_mean": 0.7,
                "time_std": 1.2,
                "layout_weight": 0.3,
                "words_weight": 0.3,
                # Teaches T5 which words belong together before it sees an image, and CLIP which words there are.
                "reading": {
                    "batch_size": 16,
                    "optimizer": _optimizer(
                        learning_rate=2e-3,
                        muon_learning_rate=0.01,
                        adam_kernels=["(words|bag)_head"],
                        warmup={"steps": 50},
                    ),
                    "loop": {
                        "duration": {"steps": 3000},
                        "log_every": 100,
                        "checkpoint_every": 1000,
                        "keep_checkpoints": 1,
                    },
                },
                "training": {
                    "batch_size": 16,
                    "optimizer": _optimizer(
                        learning_rate=2e-3,
                        muon_learning_rate=0.01,
                        adam_kernels=["img_in", "txt_in", "(time|vector)_in", "lin/kernel", "final_layer"],
                        warmup={"steps": 200},
                    ),
                    "ema_decay": 0.999,
                    "loop": {
                        "duration": {"steps": 8000},
                        "log_every": 50,
                        "checkpoint_every": 500,
                        "preview_every": 1000,
                        "keep_checkpoints": 1,
                    },
                },
            },
        }
    )
