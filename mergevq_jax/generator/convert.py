"""The released state-dict layout of stage 2, in both directions; a saved generator uses the same names."""

from collections.abc import Mapping

import numpy as np

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.tokenizer.convert import no_stage
from runtime_jax.weights import LINEAR, Rule, WeightError
from runtime_jax.weights.published import unwrapped


def generator_table(config: GeneratorConfig) -> tuple[Rule, ...]:
    """Rules of `Generator`: the released stage-2 names, and our own for what is not in the release."""
    parts = range(len(config.vocab_sizes))
    names = ("pre_emb", "post_emb") if len(parts) == 2 else [f"code_emb.{part}" for part in parts]
    return (
        *(Rule(f"{names[part]}.weight", f"code_emb_{part}/embedding") for part in parts),
        Rule("class_emb.embedding_table.weight", "class_emb/embedding"),
        Rule("merge_emb.weight", "merge_emb/embedding"),  # ours
        Rule("position_emb", "position_emb"),  # ours
        Rule("group_starts", "group_starts"),  # ours; not learned but counted
        *_generator_block("spatial_blocks"),
        *_generator_block("factorized_blocks"),
        Rule("norm.weight", "norm/scale"),
        Rule("head.{i}.weight", "head_{i}/kernel", LINEAR),
    )


def _generator_block(name: str) -> tuple[Rule, ...]:
    source, target = f"{name}.{{i}}", f"{name}[i]"
    linear = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    return (
        *(Rule(f"{source}.{part}.weight", f"{target}/{part.replace('.', '/')}/kernel", LINEAR) for part in linear),
        *(Rule(f"{source}.{part}.weight", f"{target}/{part}/scale") for part in ("attention_norm", "ffn_norm")),
    )


def generator_from_released(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The generator's part of a released stage-2 checkpoint, under the names that `generator_table` reads.

    The checkpoint holds the tokenizer as well, under `first_stage_model.`; the generator needs `zero_class_rope`.

    Raises:
      WeightError: no generator in it.
    """
    prefix = "transformer."
    tensors = unwrapped(tensors, lambda name: name.startswith(prefix))
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if not own:
        raise WeightError(f"no {prefix}* among the {len(tensors)} tensors: {no_stage(2, tensors)}")
    return own
