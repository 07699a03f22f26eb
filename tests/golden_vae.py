"""Golden files of FLUX's autoencoder and of its noise schedule; see check_golden.py."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from golden_tools import Tensors, apply, convert_both_ways, shapes, to_nhwc

from tokenverse_jax.flux import autoencoder, schedule
from tokenverse_jax.flux.convert.autoencoder import diffusers_table


def run_flux_vae(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = autoencoder.parse_config(config)
    images, module = to_nhwc(inputs["x"]), autoencoder.Autoencoder(ours)
    table = diffusers_table(ours)
    variables = {"params": convert_both_ways(table, params, shapes(module, images.shape)["params"])}
    posterior = apply(variables, images, module=module, options=(("method", "encode"),))
    decoded = apply(variables, to_nhwc(inputs["z"]), module=module, options=(("method", "decode"),))
    return {"mean": posterior.mean, "logvar": posterior.logvar, "x": decoded}


class _Sigmas(dict):
    """Arrays named sigmas_<preset>_<steps>_<image tokens>, computed when they are asked for."""

    def __init__(self, shifts: dict[str, float]):
        super().__init__()
        self.shifts = shifts

    def __missing__(self, name: str) -> np.ndarray:
        match = re.fullmatch(r"sigmas_([a-z]+)_(\d+)_(\d+)", name)
        if match is None or match[1] not in schedule.PRESETS:
            raise KeyError(name)
        config = replace(schedule.PRESETS[match[1]], **self.shifts)
        return schedule.sigmas(config, int(match[2]), int(match[3]))


def run_flow_schedule(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    return _Sigmas({name: config[name] for name in ("base_shift", "max_shift")})


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    "flux_vae": run_flux_vae,
    "flow_schedule": run_flow_schedule,
}
