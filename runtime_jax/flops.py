"""Floating-point operations of a program, counted from its jaxpr.

XLA's own count takes the body of a scan once, whatever its number of turns.
"""

import math

import jax.extend as jex


def count_flops(jaxpr: jex.core.Jaxpr) -> float:
    """FLOPs of the matmuls and convolutions of a program, those in a scan once for every turn."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # of one output number
            holes = math.prod(equation.params["lhs_dilation"])  # zeros between inputs: a strided one's gradient
            groups = equation.params["batch_group_count"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * taps / holes / groups
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += turns * sum(map(count_flops, jex.core.jaxprs_in_params(equation.params)))
    return total
