"""Compares this project's modules with the outputs that reference implementations gave.

    python tests/check_golden.py tests/golden/encoder_gr.safetensors ...

A golden file holds `param/<state-dict name>`, `in/...` and `out/...`; its metadata key `config` is the reference
constructor's arguments as JSON. The module is told by the file's name, up to an optional suffix. Prints each output's
relative error, or the share of identical entries for integers, and exits non-zero above 1e-4 or below 100 %.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergevq_jax import convert
from mergevq_jax.tokenizer import lfq, recovery, tome
from mergevq_jax.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.decoder import Decoder
from mergevq_jax.tokenizer.encoder import Encoder
from mergevq_jax.tokenizer.recovery import SourceRecovery
from runtime_jax.weights import export_weights, import_weights, read_safetensors

TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]


def parts(tensors: Tensors, kind: str) -> Tensors:
    """The tensors under `kind/`, without it."""
    return {name.removeprefix(f"{kind}/"): array for name, array in tensors.items() if name.startswith(f"{kind}/")}


def convert_both_ways(table, source: Tensors, shapes: Any) -> Any:
    """Imports a state dict and checks that exporting it again is bit-equal."""
    params = import_weights(table, source, shapes)
    exported = export_weights(table, params)
    if set(exported) != set(source) or not all(np.array_equal(exported[name], source[name]) for name in source):
        raise AssertionError("the export of the imported weights is not bit-equal to them")
    return params


def to_tokens(images: np.ndarray) -> np.ndarray:
    """[B, C, h, w] -> [B, h w, C]."""
    return images.reshape(*images.shape[:2], -1).swapaxes(1, 2)


def to_nhwc(images: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(images, 1, -1)


def source_matrix(source_map: Any, kept: int) -> np.ndarray:
    """The reference's [B, K + 1, L + 1] matrix, class token first, from a source map [B, L]."""
    groups = np.asarray(source_map)[:, None, :] == np.arange(kept)[None, :, None]
    matrix = np.zeros((groups.shape[0], kept + 1, groups.shape[2] + 1), np.int32)
    matrix[:, 0, 0] = 1
    matrix[:, 1:, 1:] = groups
    return matrix


def tokenizer_config(reference: dict[str, Any]) -> TokenizerConfig:
    """Our config from the reference's `ddconfig`."""
    names = [
        "resolution",
        "in_channels",
        "ch",
        "num_res_extra",
        "num_att_blocks",
        "num_heads",
        "head_dim",
        "z_channels",
        "num_rep_blocks",
    ]
    fields = {name: reference[name] for name in names if name in reference}
    fields["ch_mult"] = tuple(reference["ch_mult"])
    blocks = reference.get("num_res_blocks", 2)
    fields["num_res_blocks"] = tuple(blocks) if isinstance(blocks, list) else blocks
    if "z_channels" not in fields:
        fields["z_channels"] = 18
    if reference.get("isotropic"):
        fields["isotropic"] = int(reference["isotropic"])
    head = reference.get("dist_head")
    fields["dist_head"] = ("layer3" if head == "layer3" else "layer2") if head else None
    raw = (fields.get("resolution", 256) // 2 ** (len(fields["ch_mult"]) - 1)) ** 2
    fields["keep"] = raw - (reference.get("merge_num") or 0)
    if fields["dist_head"]:
        width = fields.get("isotropic") or fields["ch"] * fields["ch_mult"][-1]
        fields["num_classes"] = reference.get("num_classes") or width
    return TokenizerConfig(**fields)


def run_encoder(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    ours = tokenizer_config(config)
    images = jnp.asarray(to_nhwc(inputs["x"]))
    module = Encoder(ours)
    head = ours.dist_head is not None
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, keep=ours.keep, with_head=head))["params"]
    variables = {"params": convert_both_ways(convert.encoder_table(ours), params, shapes)}
    encoded = module.apply(variables, images, keep=ours.keep, with_head=head)
    size = jnp.concatenate([jnp.ones_like(encoded.size[:, :1]), encoded.size], axis=1)
    result = {
        "z": encoded.z,
        "head": encoded.head,
        "source": source_matrix(encoded.source_map, ours.keep),
        "size": size[..., None],
    }
    return {name: result[name] for name in expected}


def run_decoder(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    ours = tokenizer_config(config)
    module = Decoder(ours)
    codes = jnp.asarray(to_nhwc(inputs["z"]))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), codes))["params"]
    return {"x": module.apply({"params": convert_both_ways(convert.DECODER, params, shapes)}, codes)}


def run_source_recovery(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    f, side = 2, int(config["full_num"] ** 0.5)
    ours = TokenizerConfig(
        resolution=f * side,
        ch_mult=(1, 1),
        z_channels=config["embed_dim"],
        keep=config["full_num"],
        recovery=RecoveryConfig(
            rec_embed_dim=config["rec_embed_dim"], num_layers=config["num_layers"], num_heads=config["num_heads"]
        ),
    )
    codes = jnp.asarray(inputs["x"])
    module = SourceRecovery(ours)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), codes))["params"]
    logits = module.apply({"params": convert_both_ways(convert.RECOVERY, params, shapes)}, codes)
    return {
        "source": jax.nn.softmax(logits, axis=-1).swapaxes(1, 2),
        "tokens": tome.unmerge(codes, recovery.recovered_source_map(logits)),
    }


def run_tome_step(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    metric, x, size = (jnp.asarray(inputs[name]) for name in ("metric", "x", "size"))
    matching = tome.bipartite_soft_matching(metric, config["r"], class_token=config["class_token"])
    merged, new_size = tome.merge(matching, x, size[..., 0])
    identity = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    source_map = np.asarray(tome.merge_source_map(matching, identity))
    matrix = (source_map[:, None, :] == np.arange(merged.shape[1])[None, :, None]).astype(np.int32)
    return {"x": merged, "size": new_size[..., None], "source": matrix}


def run_lfq(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    z = jnp.asarray(to_tokens(inputs["x"]))

    def entropy(z):
        terms = lfq.entropy_terms(z, temperature=config.get("temperature", 0.01), eps=config.get("eps", 1e-5))
        return terms.loss, terms

    (loss, terms), gradient = jax.value_and_grad(entropy, has_aux=True)(z)
    codes = lfq.quantize(z)
    like_input = lambda tokens: np.asarray(tokens).swapaxes(1, 2).reshape(inputs["x"].shape)  # noqa: E731
    return {
        "indices": lfq.codes_to_indices(codes).reshape(-1),
        "quantized": like_input(codes),
        "aux_loss": loss,
        "sample_entropy": terms.per_sample,
        "codebook_entropy": terms.codebook,
        "commit": lfq.commitment_loss(z),
        "grad_aux": like_input(gradient),
    }


def run_lfq_factorized(config: dict, params: Tensors, inputs: Tensors, expected: Tensors) -> Tensors:
    indices = lfq.codes_to_indices(jnp.asarray(to_tokens(inputs["x"])))
    pre, post = lfq.split_indices(indices, config["factorized_bits"])
    return {"pre": pre.reshape(-1), "post": post.reshape(-1)}


RUNNERS: dict[str, Callable[..., Tensors]] = {
    "tome_step": run_tome_step,
    "encoder": run_encoder,
    "decoder": run_decoder,
    "lfq": run_lfq,
    "lfq_factorized": run_lfq_factorized,
    "source_recovery": run_source_recovery,
}


def runner_for(path: Path) -> Callable[..., Tensors]:
    """The runner whose name is the longest start of the file's."""
    names = [name for name in RUNNERS if path.stem == name or path.stem.startswith(name + "_")]
    if not names:
        raise ValueError(f"{path.name}: no module of that name; known are {', '.join(sorted(RUNNERS))}")
    return RUNNERS[max(names, key=len)]


def compare(got: np.ndarray, expected: np.ndarray) -> tuple[float, bool]:
    """(relative error, False), or for integers and 0/1 matrices (share of identical entries, True)."""
    if got.size == expected.size and got.shape != expected.shape:
        expected = to_nhwc(expected) if to_nhwc(expected).shape == got.shape else to_tokens(expected)
    if got.shape != expected.shape:
        raise ValueError(f"shape {got.shape}, but the reference has {expected.shape}")
    if np.issubdtype(got.dtype, np.integer):
        return float(np.mean(got == expected)), True
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    scale = np.abs(expected).max() or 1.0
    return float(np.abs(got - expected).max() / scale), False


def check(path: Path) -> dict[str, tuple[float, bool]]:
    """(value, exact) of each output of one golden file; see `compare`."""
    tensors, metadata = read_safetensors(path)
    config = json.loads(metadata["config"])
    expected = parts(tensors, "out")
    got = runner_for(path)(config, parts(tensors, "param"), parts(tensors, "in"), expected)
    if set(got) != set(expected):
        raise ValueError(f"{path.name}: outputs {sorted(expected)} in the file, {sorted(got)} from the module")
    return {name: compare(np.asarray(got[name]), expected[name]) for name in expected}


def good(value: float, exact: bool) -> bool:
    """Whether one compared output passes."""
    return value == 1.0 if exact else value <= TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    jax.config.update("jax_default_matmul_precision", "highest")
    failed = 0
    for path in parser.parse_args(argv).files:
        for name, (value, exact) in check(path).items():
            passed = good(value, exact)
            failed += not passed
            text = f"{100 * value:7.3f} % identical" if exact else f"{value:.2e} relative error"
            print(f"{path.stem:24} {name:20} {text}{'' if passed else '   FAILED'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
