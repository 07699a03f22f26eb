"""A trained generator, its folder, and the tokenizer whose codes it generates.

Axes: B batch, H W image, L raster tokens, K codes; M choices of K, C classes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mergevq_jax import model_folder
from mergevq_jax.generator import convert
from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.data import check_tokenizer
from mergevq_jax.generator.kinds.randar import Codes
from mergevq_jax.generator.kinds.random import GROUP_STARTS
from mergevq_jax.generator.kinds.table import KINDS, KindName
from mergevq_jax.generator.sampling.plan import SamplingConfig
from mergevq_jax.generator.sampling.raster import Samples
from mergevq_jax.generator.transformer import SHARDING_RULES, Params, param_shapes
from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer
from runtime_jax.files import path_of
from runtime_jax.messages import cut
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import param_shardings, place
from runtime_jax.weights import import_weights

MODEL_TYPE = "mergevq_generator"


@dataclass(frozen=True, kw_only=True)
class TokenizerRef:
    """The tokenizer whose codes a generator generates."""

    name: str  # shipped, folder or hub id
    fingerprint: str  # `Tokenizer.code_fingerprint`


@dataclass(frozen=True, kw_only=True)
class GeneratorInfo:
    """What a generator's config.json says."""

    kind: KindName  # of training and sampling
    window: int  # recent tokens that it always saw in training
    classes: tuple[str, ...]  # their names
    tokenizer: TokenizerRef
    architecture: GeneratorConfig

    def sampling(self, settings: SamplingConfig) -> SamplingConfig:
        """Sampling settings with the defaults of its kind; see `Kind.settings`."""
        return KINDS[self.kind].settings(settings, self.architecture, self.window)

    def class_number(self, name: str) -> int:
        """The number of a class, given by name, or by number unless all names are numbers.

        Raises:
          ValueError: no such class.
        """
        names, count = self.classes, self.architecture.num_classes
        if name in names:
            return names.index(name)
        by_number = not (names and all(own.isdecimal() for own in names))
        if by_number and name in map(str, range(count)):
            return int(name)
        known = [f"named {cut(names, most=20)}"] * bool(names) + [f"numbered 0 to {count - 1}"] * by_number
        raise ValueError(f"class {name!r}: this generator's classes are {', and '.join(known)}")


@dataclass(frozen=True)
class GeneratorModel:
    """A generator with its weights: what a user loads.

    >>> model = GeneratorModel.from_pretrained("folder")
    >>> samples = model.sample([3, 3], 144, sampling=SamplingConfig(cfg_scale=2.0), seed=0)
    >>> images = codes_to_images(model.load_tokenizer(), samples.indices)  # uint8 [B, H, W, 3]
    """

    info: GeneratorInfo
    params: Params
    start_counts: Int[Array | np.ndarray, "M C L"] | None = None  # of RandAR; counted as in `positions`
    compute: Compute = Compute()

    @property
    def config(self) -> GeneratorConfig:
        """The architecture."""
        return self.info.architecture

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, compute: Compute = Compute()) -> "GeneratorModel":
        """Loads a folder with config.json and model.safetensors, a hub id, or a shipped one by its name.

        Raises:
          ValueError: folder, a file in it or a parameter missing; another kind of model.
        """
        folder = model_folder.find_folder(path, "generator")
        info = read_info(folder)
        config, shapes = info.architecture, param_shapes(info.architecture)
        shapes = shapes | jax.eval_shape(lambda: KINDS[info.kind].new_counts(config))
        params = model_folder.read_params(folder, convert.generator_table(config), shapes)
        starts = params.pop(GROUP_STARTS, None)
        return cls(info, params, None if starts is None else starts.astype(jnp.int32), compute)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors (released state-dict names); each file atomically."""
        table = convert.generator_table(self.config)
        model_folder.write_folder(path_of(path), MODEL_TYPE, self.info, table, self._saved)

    def fingerprint(self) -> str:
        """SHA-256 over config and parameters."""
        return model_folder.fingerprint(self.info, convert.generator_table(self.config), self._saved)

    @property
    def _saved(self) -> dict[str, Any]:
        return self.params | ({} if self.start_counts is None else {GROUP_STARTS: self.start_counts})

    def place(self, mesh: Mesh) -> "GeneratorModel":
        """The model with its weights on a mesh, sharded as in training; use it under `jax.set_mesh(mesh)`."""
        return replace(self, params=place(self.params, param_shardings(self.params, SHARDING_RULES, mesh)))

    def load_tokenizer(self, source: str | os.PathLike | None = None) -> Tokenizer:
        """The tokenizer whose codes it generates.

        Args:
          source: shipped name, folder or hub id; None: the one that it was trained with.

        Raises:
          ValueError: no tokenizer there, or another than it was trained with.
        """
        source = self.info.tokenizer.name if source is None else source
        tokenizer = load_tokenizer(source)
        if not tokenizer.made(self.info.tokenizer.fingerprint):
            found = tokenizer.code_fingerprint()
            raise ValueError(
                f"tokenizer {source} (fingerprint {found[:12]}) does not make the codes that this generator learned: "
                f"{self.info.tokenizer.name} (fingerprint {self.info.tokenizer.fingerprint[:12]})"
            )
        return tokenizer

    def sample(
        self,
        labels: Sequence[int] | Int[np.ndarray, "B"],
        keep: int | None = None,
        *,
        sampling: SamplingConfig,
        seed: int,
        steps: int | None = None,
        examples: Int[np.ndarray, "B"] | None = None,
        positions: Int[np.ndarray, "B K"] | None = None,
    ) -> Samples | Codes:
        """Codes of one image for each label.

        Args:
          keep: K, distinct tokens that the model is asked for; None without merge instruction.
          sampling: how to draw; the window and the capacity are those of its kind unless they say more.
          seed: with an example's number it determines the example's random numbers.
          steps, positions: of RandAR alone; see `randar_sample`.
          examples: numbers of the examples; None: 0 to B - 1.

        Returns:
          All L codes in raster order, or RandAR's K codes and their positions.

        Raises:
          ValueError: what is asked for is not possible with this generator.
          NotFiniteError: logits that are not finite.
        """
        return KINDS[self.info.kind].draw(
            self.params,
            np.asarray(labels, np.int32),
            keep,
            config=self.config,
            sampling=self.info.sampling(sampling),
            seed=seed,
            steps=steps,
            examples=examples,
            positions=positions,
            counts={} if self.start_counts is None else {GROUP_STARTS: self.start_counts},
            compute=self.compute,
        )


def read_info(source: str | os.PathLike) -> GeneratorInfo:
    """The config.json of a generator (shipped name, folder or hub id), without its weights.

    Raises:
      ValueError: as `GeneratorModel.from_pretrained`.
    """
    folder = model_folder.find_folder(source, "generator")
    return model_folder.read_config(folder / model_folder.CONFIG_NAME, GeneratorInfo, MODEL_TYPE, "generator")


def load_generator(source: str | os.PathLike, *, compute: Compute = Compute()) -> GeneratorModel:
    """A shipped generator by its name, otherwise a folder or hub id.

    Raises:
      ValueError: as `GeneratorModel.from_pretrained`.
    """
    return GeneratorModel.from_pretrained(source, compute=compute)


def import_released(
    config: GeneratorConfig, tensors: Mapping[str, np.ndarray], tokenizer: str | os.PathLike
) -> GeneratorModel:
    """The plain generator in a released stage-2 checkpoint.

    Args:
      config: its architecture, without merge instruction and with `zero_class_rope`.
      tensors: the checkpoint's `state_dict`.
      tokenizer: shipped name, folder or hub id of the tokenizer that it was trained with.

    Raises:
      ValueError: no such generator in it, or a tokenizer that does not fit.
    """
    loaded = load_tokenizer(tokenizer)
    check_tokenizer(config, loaded)
    table = convert.generator_table(config)
    params = import_weights(table, convert.generator_from_released(tensors), param_shapes(config))
    reference = TokenizerRef(name=str(tokenizer), fingerprint=loaded.code_fingerprint())
    info = GeneratorInfo(kind="plain", window=config.length, classes=(), tokenizer=reference, architecture=config)
    return GeneratorModel(info, params)
