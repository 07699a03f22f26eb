"""Golden files of the MergeVQ modules and of DINO; see check_golden.py."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_tools import Tensors, apply, convert_both_ways, jit, require_equal, shapes, to_nhwc, to_tokens

from mergevq_jax.generator import transformer
from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.convert import generator_table
from mergevq_jax.generator.sub_tokens import join_indices, split_indices
from mergevq_jax.tokenizer import convert, recovery, tome
from mergevq_jax.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.decoder import Decoder
from mergevq_jax.tokenizer.encoder import Encoder
from mergevq_jax.tokenizer.losses import adversarial
from mergevq_jax.tokenizer.quantizers import lfq
from mergevq_jax.tokenizer.recovery import SourceRecovery
from runtime_jax.networks import dino, dinov2
from runtime_jax.weights import CONV, Rule, export_weights, layer, norm


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
        "indices": lfq.to_indices(codes).reshape(-1),
        "quantized": like_input(codes),
        "aux_loss": loss,
        "sample_entropy": terms.per_sample,
        "codebook_entropy": terms.codebook,
        "commit": lfq.commitment_loss(z),
        "grad_aux": like_input(gradient),
    }


def run_lfq_factorized(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    indices = lfq.to_indices(jnp.asarray(to_tokens(inputs["x"])))
    pre, post = split_indices(indices, [2**bits for bits in config["factorized_bits"]])
    return {"pre": pre.reshape(-1), "post": post.reshape(-1)}


def discriminator_table(num_layers: int) -> tuple[Rule, ...]:
    """Rules from the reference's state dict to `{"params": .., "batch_stats": ..}` of `PatchDiscriminator`."""
    table = [*layer("main.0", "params/conv_0", CONV), *layer(f"main.{3 * num_layers + 2}", "params/logits", CONV)]
    for n in range(1, num_layers + 1):
        table += [
            Rule(f"main.{3 * n - 1}.weight", f"params/conv_{n}/kernel", CONV),
            *norm(f"main.{3 * n}", f"params/norm_{n}"),
            Rule(f"main.{3 * n}.running_mean", f"batch_stats/norm_{n}/mean"),
            Rule(f"main.{3 * n}.running_var", f"batch_stats/norm_{n}/var"),
        ]
    return tuple(table)


def run_patchgan(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    images = to_nhwc(inputs["x"])
    kernels = [name for name, array in params.items() if array.ndim == 4]
    module = adversarial.PatchDiscriminator(ndf=len(params["main.0.weight"]), num_layers=len(kernels) - 2)
    variables = convert_both_ways(
        discriminator_table(module.num_layers),
        params,
        shapes(module, images.shape, (("train", False),)),
        ignore=(r"main\.\d+\.num_batches_tracked",),
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


def generator_config(reference: dict[str, Any], params: Tensors) -> GeneratorConfig:
    """Our config from the reference's arguments; the feed-forward width is told from the weights."""
    side = math.isqrt(reference["block_size"])
    return GeneratorConfig(
        num_layers=reference["spatial_n_layer"],
        dim=reference["dim"],
        num_heads=reference["n_head"],
        ffn_dim=len(params["spatial_blocks.0.feed_forward.w1.weight"]),
        head_layers=reference["factorized_n_layer"],
        vocab_sizes=tuple(2**bits for bits in reference["factorized_bits"]),
        num_classes=reference["class_num"],
        grid=(side, side),
        merge_instruction=False,
        zero_class_rope=True,
    )


@functools.partial(jit, static_argnames="module")
def teacher_forced(params: Any, indices: np.ndarray, labels: np.ndarray, *, module: transformer.Generator) -> Any:
    """Logits of every sub-token."""
    return module.apply({"params": params}, indices, labels)


def run_gpt(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = generator_config(config, params)
    weights = convert_both_ways(generator_table(ours), params, transformer.param_shapes(ours))
    sub_tokens = [jnp.asarray(inputs[name], jnp.int32) for name in ("pre", "post")]
    indices = join_indices(sub_tokens, ours.vocab_sizes)
    labels = inputs["class"][:, 0].astype(np.int32)
    pre, post = teacher_forced(weights, indices, labels, module=transformer.Generator(ours))
    return {"logits_pre": pre, "logits_post": post}


def run_dinov2(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    sizes = dinov2.parse_config(config)
    variables = dinov2.convert_dinov2(params, sizes)
    require_equal(
        export_weights(dinov2.TABLE, variables),
        {name: array for name, array in params.items() if name != "embeddings.mask_token"},
    )
    output = apply({"params": variables}, to_nhwc(inputs["x"]), module=dinov2.DINOv2(sizes))
    return {"hidden": output.hidden, "pooled": output.pooled}


def run_dino(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    sizes = dino.parse_config(config)
    module = dinov2.DINOv2(sizes)
    output = apply({"params": dino.convert_dino(params, sizes)}, to_nhwc(inputs["x"]), module=module)
    return {"hidden": output.hidden, "pooled": output.pooled}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    "tome_step": run_tome_step,
    "encoder": run_encoder,
    "decoder": run_decoder,
    "lfq": run_lfq,
    "lfq_factorized": run_lfq_factorized,
    "source_recovery": run_source_recovery,
    "patchgan": run_patchgan,
    "gpt": run_gpt,
    "dino": run_dino,
    "dinov2": run_dinov2,
}
