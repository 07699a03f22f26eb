"""Makes golden files: random weights and inputs, and what reference implementations give for them.

    make parity                                          # installs diffusers and torch in .venv-parity
    python tests/make_goldens.py --out FOLDER            # all of them
    python tests/make_goldens.py --out FOLDER dinov2     # by name
    python tests/check_golden.py FOLDER/*.safetensors

A file has the form that check_golden.py describes. No parameter keeps its initial value, so that one which is forgotten
or mixed up in the conversion shows in the outputs.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

Tensors = dict[str, torch.Tensor]


class Golden(NamedTuple):
    """What goes into one file: the reference constructor's arguments, its state dict, inputs and outputs."""

    config: dict[str, Any]
    params: Tensors
    inputs: Tensors
    outputs: Tensors


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    """Normal values, float32; NumPy's, because PyTorch's may differ between versions and machines."""
    return torch.from_numpy(np.asarray(mean + scale * rng.normal(size=shape))).float()


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> Tensors:
    """Gives every parameter a random value of a size at which all layers matter; returns the state dict."""
    values = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if name.endswith("bias"):
            values[name] = normal(rng, *shape, scale=0.1)
        elif len(shape) == 1:  # scales of norms and LayerScale
            values[name] = normal(rng, *shape, scale=0.2, mean=1.0)
        elif name.endswith("weight"):
            values[name] = normal(rng, *shape, scale=float(np.prod(shape[1:])) ** -0.5)
        else:  # tokens, position embeddings and temperatures
            values[name] = normal(rng, *shape, scale=0.5)
    model.load_state_dict(values, strict=False)  # without the buffers
    return model.state_dict()


def dinov2(rng: np.random.Generator) -> Golden:
    """Three layers, on images of another size than the position embeddings': these are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 4,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 3,
    }
    model = Dinov2Model(Dinov2Config(**config)).eval()
    params, images = randomise(model, rng), normal(rng, 2, 3, 42, 42)
    output = model(pixel_values=images)
    outputs = {"hidden": output.last_hidden_state, "pooled": output.pooler_output}
    return Golden(config, params, {"x": images}, outputs)


def flux_transformer(rng: np.random.Generator, grid: tuple[int, int], text_tokens: int, **config: Any) -> Golden:
    """Two images of a grid that is longer than 64 tokens, with text."""
    from diffusers import FluxTransformer2DModel

    config = {"patch_size": 1, "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24} | config
    model = FluxTransformer2DModel(**config).eval()
    params, tokens = randomise(model, rng), grid[0] * grid[1]
    inputs = {
        "img": normal(rng, 2, tokens, config["in_channels"]),
        "img_ids": torch.tensor([(0.0, row, column) for row in range(grid[0]) for column in range(grid[1])]),
        "txt": normal(rng, 2, text_tokens, config["joint_attention_dim"]),
        "txt_ids": torch.zeros(text_tokens, 3),
        "timestep": torch.from_numpy(rng.uniform(size=2)).float(),
        "vec": normal(rng, 2, config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.tensor([1.0, 3.5])
    theirs = {"img": "hidden_states", "txt": "encoder_hidden_states", "vec": "pooled_projections"}
    output = model(**{theirs.get(name, name): value for name, value in inputs.items()})
    return Golden(config, params, inputs, {"img": output.sample})


def flux_vae(rng: np.random.Generator) -> Golden:
    """Two levels, on images that are not square; encoder and decoder by themselves."""
    from diffusers import AutoencoderKL

    config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    model = AutoencoderKL(**config).eval()
    params, images, latents = randomise(model, rng), normal(rng, 2, 3, 32, 48), normal(rng, 2, 4, 16, 24)
    posterior = model.encode(images).latent_dist
    outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "x": model.decode(latents).sample}
    return Golden(config, params, {"x": images, "z": latents}, outputs)


def clip_text(rng: np.random.Generator) -> Golden:
    """Texts of several lengths; eos_token_id 2, as in FLUX's own config, pools at the largest id."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "projection_dim": 32,
    }
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    params, ids = randomise(model, rng), torch.from_numpy(rng.integers(3, 98, (3, 24)))
    for row, end in zip(ids, (5, 16, 23), strict=True):
        row[end:] = 98
    output = model(input_ids=ids)
    outputs = {"hidden": output.last_hidden_state, "pooled": output.pooler_output}
    return Golden(config, params, {"input_ids": ids}, outputs)


def clip(rng: np.random.Generator) -> Golden:
    """Both towers, of different widths, and their projections; eos_token_id is a real one, as in newer configs."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    text |= {"eos_token_id": 98, "bos_token_id": 0, "pad_token_id": 1}
    vision = {"hidden_size": 48, "intermediate_size": 80, "image_size": 28, "patch_size": 7}
    config = {"model_type": "clip", "projection_dim": 24, "text_config": text | sizes, "vision_config": vision | sizes}
    model = CLIPModel(CLIPConfig(**config)).eval()
    params, images, ids = randomise(model, rng), normal(rng, 2, 3, 28, 28), rng.integers(3, 98, (3, 16))
    for row, end in zip(ids, (4, 11, 15), strict=True):
        row[end:] = 98
    inputs = {"x": images, "input_ids": torch.from_numpy(ids)}
    outputs = {
        "images": model.get_image_features(pixel_values=images).pooler_output,
        "texts": model.get_text_features(input_ids=inputs["input_ids"]).pooler_output,
    }
    return Golden(config, params, inputs, outputs)


def dino(rng: np.random.Generator) -> Golden:
    """DINO's first version: a ViT without LayerScale, with its own epsilon."""
    from transformers import ViTConfig, ViTModel

    config = {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 3,
        "layer_norm_eps": 1e-3,  # larger than any in use, so that another one shows
    }
    model = ViTModel(ViTConfig(**config), add_pooling_layer=False).eval()
    params, images = randomise(model, rng), normal(rng, 2, 3, 28, 28)
    hidden = model(pixel_values=images).last_hidden_state
    return Golden(config, params, {"x": images}, {"hidden": hidden, "pooled": hidden[:, 0]})


def t5_encoder(rng: np.random.Generator) -> Golden:
    """Texts longer than the distances that have buckets of their own."""
    from transformers import T5Config, T5EncoderModel

    config = {
        "vocab_size": 100,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "dropout_rate": 0.0,
    }
    model = T5EncoderModel(T5Config(**config)).eval()
    params, ids = randomise(model, rng), torch.from_numpy(rng.integers(0, 100, (2, 40)))
    return Golden(config, params, {"input_ids": ids}, {"hidden": model(input_ids=ids).last_hidden_state})


def flow_schedule(rng: np.random.Generator) -> Golden:
    """Noise levels of FLUX.1-dev and schnell for several numbers of steps and sizes; nothing is random."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    shifts = {"base_shift": 0.5, "max_shift": 1.15}
    outputs = {}
    for steps, tokens in ((28, 1024), (50, 4096), (20, 1536)):
        for name, options in (("dev", {"shift": 3.0, "use_dynamic_shifting": True}), ("schnell", {"shift": 1.0})):
            scheduler = FlowMatchEulerDiscreteScheduler(**options)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, **shifts))
            outputs[f"sigmas_{name}_{steps}_{tokens}"] = scheduler.sigmas
    return Golden({"name": "out/sigmas_<dev|schnell>_<steps>_<image tokens>"} | shifts, {}, {}, outputs)


def inception(rng: np.random.Generator) -> Golden:
    """Images that are not square; the weights are those of a seed, and every 7th feature is kept."""
    from inception_reference import reference_features
    from inception_tools import random_weights

    config = {"seed": 0, "every": 7}
    images = rng.integers(0, 256, (2, 40, 56, 3), np.uint8)
    features = reference_features(random_weights(config["seed"]), images)
    outputs = {name: torch.from_numpy(value[:, :: config["every"]].copy()) for name, value in features.items()}
    return Golden(config, {}, {"images": torch.from_numpy(images)}, outputs)


# By the name of the file, which tells check_golden.py the module.
MAKERS: dict[str, Callable[[np.random.Generator], Golden]] = {
    "clip": clip,
    "clip_text": clip_text,
    "dino": dino,
    "dinov2": dinov2,
    "flow_schedule": flow_schedule,
    "flux_transformer": functools.partial(
        flux_transformer,
        grid=(4, 70),
        text_tokens=9,
        guidance_embeds=True,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        axes_dims_rope=[4, 6, 6],
    ),
    "flux_transformer_schnell": functools.partial(
        flux_transformer,
        grid=(66, 5),
        text_tokens=7,
        guidance_embeds=False,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=[4, 4, 8],
    ),
    "flux_vae": flux_vae,
    "inception": inception,
    "t5_encoder": t5_encoder,
}


@torch.no_grad()
def make(name: str, folder: Path, seed: int) -> Path:
    """Writes `folder/<name>.safetensors`; the file depends on the name and the seed alone."""
    golden = MAKERS[name](np.random.default_rng(seed))
    kinds = {"param": golden.params, "in": golden.inputs, "out": golden.outputs}
    tensors = {
        f"{kind}/{key}": np.ascontiguousarray(tensor.numpy())
        for kind, part in kinds.items()
        for key, tensor in part.items()
    }
    path = folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"config": json.dumps(golden.config)})
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sorted(MAKERS))} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - MAKERS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(sorted(MAKERS))}")
    for name in args.names or MAKERS:
        print(make(name, args.out, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
