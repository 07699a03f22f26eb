"""Compares this project's modules with the outputs that reference implementations gave.

    python tests/check_golden.py tests/golden/encoder_gr.safetensors ...

A golden file holds `param/<state-dict name>`, `in/...` and `out/...`; its metadata key `config` is the reference
constructor's arguments as JSON. The module is told by the file's name, up to an optional suffix. Prints each output's
relative error, or the share of identical entries for integers, and exits non-zero above 1e-4, below 100 %, or for a
file that cannot be checked.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergevq_jax import convert
from mergevq_jax.tokenizer import adversarial, dinov2, lfq, recovery, tome
from mergevq_jax.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.decoder import Decoder
from mergevq_jax.tokenizer.encoder import Encoder
from mergevq_jax.tokenizer.recovery import SourceRecovery
from runtime_jax.weights import Rule, export_weights, import_weights, read_safetensors

TOLERANCE = 1e-4
Tensors = dict[str, np.ndarray]
Options = tuple[tuple[str, Any], ...]
# Programs this small compile for longer than they run; op by op, Flax is slower still.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def parts(tensors: Tensors, kind: str) -> Tensors:
    """The tensors under `kind/`, without it."""
    return {name.removeprefix(f"{kind}/"): array for name, array in tensors.items() if name.startswith(f"{kind}/")}


@functools.lru_cache
def shapes(module: nn.Module, shape: tuple[int, ...], options: Options = ()) -> Any:
    """Shapes of a module's variables, by tracing its init on an input of `shape`."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), **dict(options)))


@functools.partial(jit, static_argnames=("module", "options"))
def apply(variables: Any, inputs: Any, *, module: nn.Module, options: Options = ()) -> Any:
    """The module's outputs."""
    return module.apply(variables, inputs, **dict(options))


def convert_both_ways(table: Sequence[Rule], source: Tensors, target: Any, *, ignore: Sequence[str] = ()) -> Any:
    """Imports a state dict and checks that exporting it again is bit-equal.

    Raises:
      ValueError: the weights do not fit, or come back changed.
    """
    params = import_weights(table, source, target, ignore=ignore)
    require_equal(
        export_weights(table, params),
        {name: array for name, array in source.items() if not any(re.fullmatch(pattern, name) for pattern in ignore)},
    )
    return params


def require_equal(exported: Tensors, source: Tensors) -> None:
    """Raises ValueError unless both have the same names and bits."""
    for name in sorted(exported.keys() | source.keys()):
        ours, theirs = exported.get(name), source.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or ours.tobytes() != theirs.tobytes():
            raise ValueError(f"{name}: the export of the imported weights is not bit-equal to them")


def to_tokens(images: np.ndarray) -> np.ndarray:
    """[B, C, h, w] -> [B, h w, C]."""
    return images.reshape(*images.shape[:2], -1).swapaxes(1, 2)


def to_nhwc(images: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(images, 1, -1)


def one_hot(source_map: Any, kept: int) -> np.ndarray:
    """The reference's matrix [B, K, L] of a source map [B, L]."""
    return (np.asarray(source_map)[:, None, :] == np.arange(kept)[None, :, None]).astype(np.int32)


def with_class_token(matrix: np.ndarray) -> np.ndarray:
    """[B, K, L] -> [B, K + 1, L + 1] with the class token's row and column first."""
    matrix = np.pad(matrix, ((0, 0), (1, 0), (1, 0)))
    matrix[:, 0, 0] = 1
    return matrix


def tokenizer_config(reference: dict[str, Any], params: Tensors) -> TokenizerConfig:
    """Our config from the reference's arguments; widths that they leave open are told from the weights."""
    names = ["resolution", "in_channels", "ch", "num_res_extra", "num_att_blocks", "num_heads", "num_rep_blocks"]
    fields = {name: reference[name] for name in [*names, "head_dim", "z_channels"] if name in reference}
    fields["ch_mult"] = tuple(reference["ch_mult"])
    blocks = reference.get("num_res_blocks", 2)
    fields["num_res_blocks"] = tuple(blocks) if isinstance(blocks, list) else blocks
    if reference.get("isotropic"):
        fields["isotropic"] = len(params["conv_in.0.weight"])
    fields["dist_head"] = None
    if reference.get("dist_head"):
        fields["dist_head"], last = ("layer3", 4) if reference["dist_head"] == "layer3" else ("layer2", 3)
        fields["num_classes"] = len(params[f"dist_head.{last}.weight"])
    raw = (fields.get("resolution", 256) // 2 ** (len(fields["ch_mult"]) - 1)) ** 2
    return TokenizerConfig(**fields, keep=raw, recovery=None)


def run_encoder(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = tokenizer_config(config, params)
    images = to_nhwc(inputs["x"])
    rows, columns = ours.grid(*images.shape[1:3])
    keep = rows * columns - (config.get("merge_num") or 0)
    options = (("keep", keep), ("with_head", ours.dist_head is not None))
    target = shapes(Encoder(ours), images.shape, options)["params"]
    variables = {"params": convert_both_ways(convert.encoder_table(ours), params, target)}
    encoded = apply(variables, images, module=Encoder(ours), options=options)
    size = np.concatenate([np.ones_like(encoded.size[:, :1]), encoded.size], axis=1)
    source = with_class_token(one_hot(encoded.source_map, keep))
    return {"z": encoded.z, "head": encoded.head, "source": source, "size": size[..., None]}


def run_decoder(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    codes = to_nhwc(inputs["z"])
    module = Decoder(tokenizer_config(config, params))
    variables = {"params": convert_both_ways(convert.DECODER, params, shapes(module, codes.shape)["params"])}
    return {"x": apply(variables, codes, module=module)}


def run_source_recovery(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    sizes = {name: config[name] for name in ("rec_embed_dim", "num_layers", "num_heads") if name in config}
    codes, module = inputs["x"], SourceRecovery(RecoveryConfig(**sizes), params["rec_tokens"].shape[1])
    variables = {"params": convert_both_ways(convert.RECOVERY, params, shapes(module, codes.shape)["params"])}
    logits = apply(variables, codes, module=module)
    return {
        "source": jax.nn.softmax(logits, axis=-1).swapaxes(1, 2),
        "tokens": tome.unmerge(jnp.asarray(codes), recovery.recovered_source_map(logits)),
    }


def run_tome_step(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    metric, x, size = (jnp.asarray(inputs[name]) for name in ("metric", "x", "size"))
    # The reference merges at most half of the tokens and no more, whatever r says; ours takes no such r.
    r = min(config["r"], (x.shape[1] - config["class_token"]) // 2)

    @jit
    def step(metric, x, size):
        matching = tome.bipartite_soft_matching(metric, r, class_token=config["class_token"])
        identity = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return *tome.merge(matching, x, size[..., 0]), tome.merge_source_map(matching, identity)

    merged, new_size, source_map = step(metric, x, size)
    return {"x": merged, "size": new_size[..., None], "source": one_hot(source_map, merged.shape[1])}


def run_lfq(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    z = jnp.asarray(to_tokens(inputs["x"]))

    def entropy(z):
        terms = lfq.entropy_terms(z, temperature=config.get("temperature", 0.01), eps=config.get("eps", 1e-5))
        return terms.loss, terms

    (loss, terms), gradient = jit(jax.value_and_grad(entropy, has_aux=True))(z)
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


def run_lfq_factorized(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    indices = lfq.codes_to_indices(jnp.asarray(to_tokens(inputs["x"])))
    pre, post = lfq.split_indices(indices, config["factorized_bits"])
    return {"pre": pre.reshape(-1), "post": post.reshape(-1)}


def run_patchgan(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    images = to_nhwc(inputs["x"])
    kernels = [name for name, array in params.items() if array.ndim == 4]
    module = adversarial.PatchDiscriminator(ndf=len(params["main.0.weight"]), num_layers=len(kernels) - 2)
    variables = convert_both_ways(
        adversarial.discriminator_table(module.num_layers),
        params,
        shapes(module, images.shape, (("train", False),)),
        ignore=adversarial.DISCRIMINATOR_IGNORED,
    )
    batch_normalised, _ = apply(
        variables, images, module=module, options=(("train", True), ("mutable", ("batch_stats",)))
    )
    real, fake = (jnp.asarray(to_nhwc(inputs[name])) for name in ("real", "fake"))
    ema = adversarial.LeCam.zeros().update(real, fake, decay=config.get("ema_decay", 0.9))
    return {
        "logits_train": batch_normalised,
        "logits_eval": apply(variables, images, module=module, options=(("train", False),)),
        "hinge_d": adversarial.hinge_d_loss(real, fake),
        "vanilla_d": adversarial.vanilla_d_loss(real, fake),
        "hinge_g": adversarial.hinge_g_loss(fake),
        "nonsat_g": adversarial.non_saturating_g_loss(fake),
        "ema_real": ema.real,
        "ema_fake": ema.fake,
        "lecam": adversarial.lecam_loss(real, fake, ema),
    }


def run_dinov2(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    sizes = dinov2.parse_config(config)
    variables = dinov2.convert_dinov2(params, sizes)
    require_equal(
        export_weights(dinov2.TABLE, variables),
        {name: array for name, array in params.items() if name != "embeddings.mask_token"},
    )
    output = apply({"params": variables}, to_nhwc(inputs["x"]), module=dinov2.DINOv2(sizes))
    return {"hidden": output.hidden, "pooled": output.pooled}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    "tome_step": run_tome_step,
    "encoder": run_encoder,
    "decoder": run_decoder,
    "lfq": run_lfq,
    "lfq_factorized": run_lfq_factorized,
    "source_recovery": run_source_recovery,
    "patchgan": run_patchgan,
    "dinov2": run_dinov2,
}


def runner_for(path: Path) -> Callable[[dict, Tensors, Tensors], Tensors]:
    """The runner whose name is the longest start of the file's."""
    names = [name for name in RUNNERS if path.stem == name or path.stem.startswith(name + "_")]
    if not names:
        raise ValueError(f"{path}: no module of that name; known are {', '.join(sorted(RUNNERS))}")
    return RUNNERS[max(names, key=len)]


def compare(got: np.ndarray, expected: np.ndarray) -> tuple[float, bool]:
    """(relative error, False), or for integers and 0/1 matrices (share of identical entries, True)."""
    if got.shape != expected.shape and got.size == expected.size and expected.ndim > 2:
        expected = to_nhwc(expected) if to_nhwc(expected).shape == got.shape else to_tokens(expected)
    if got.shape != expected.shape:
        raise ValueError(f"shape {got.shape}, but the reference has {expected.shape}")
    if np.issubdtype(got.dtype, np.integer):
        return float(np.mean(got == expected)), True
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    scale = np.abs(expected).max() or 1.0
    return float(np.abs(got - expected).max() / scale), False


def check(path: Path) -> dict[str, tuple[float, bool]]:
    """(value, exact) of each output of one golden file; see `compare`.

    Raises:
      ValueError: the file cannot be read, lacks something, or does not fit a module of ours.
    """
    if path.name == "tome_schedule.json":
        return check_schedules(path)
    runner = runner_for(path)
    tensors, metadata = read_safetensors(path)
    expected = parts(tensors, "out")
    if not expected:
        raise ValueError(f"{path}: no out/... among its {len(tensors)} tensors")
    try:
        config = json.loads(metadata["config"])
        got = runner(config, parts(tensors, "param"), parts(tensors, "in"))
        return {name: compare(np.asarray(got[name]), expected[name]) for name in expected}
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing, from the file or from the module's outputs") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_schedules(path: Path) -> dict[str, tuple[float, bool]]:
    """The same for a JSON file of merge counts under "raw->kept/layers"."""
    result = {}
    for name, entry in json.loads(path.read_text()).items():
        raw, kept, layers = map(int, name.replace("->", "/").split("/"))
        counts = np.asarray(tome.merge_counts(raw, kept, layers))
        result[name] = compare(counts, np.asarray(entry["per_layer"]))
    return result


def good(value: float, exact: bool) -> bool:
    """Whether one compared output passes."""
    return value == 1.0 if exact else value <= TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    jax.config.update("jax_default_matmul_precision", "highest")
    failed = 0
    for path in parser.parse_args(argv).files:
        try:
            compared = check(path)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        for name, (value, exact) in compared.items():
            passed = good(value, exact)
            failed += not passed
            text = f"{100 * value:7.3f} % identical" if exact else f"{value:.2e} relative error"
            print(f"{path.stem:24} {name:20} {text}{'' if passed else '   FAILED'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
