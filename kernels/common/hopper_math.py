"""Functions of float32 registers in Hopper kernels, in few instructions of the chip's slowest unit.

A sigmoid is rsqrt(1 + exp2(-y))^2, a root z rsqrt(z): no division, and the digits of small results are kept.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from numpy.polynomial import Chebyshev, Polynomial

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# Above this log2(a), 1 - a^2 loses digits and is log2(a) times a polynomial of it instead: 1e-7 relative.
NEAR_ONE = -0.36
POLYNOMIAL = (
    Chebyshev.interpolate(lambda w: -np.expm1(2 * LN2 * w) / w, 4, [NEAR_ONE, 0])
    .convert(kind=Polynomial)
    .coef
)
# Keeps the inverse root of 0 finite.
TINY = 1e-30
# Of gelu(x) = x sigmoid(x (LINEAR + CUBIC x^2)), exponents in base 2: by the tanh formula, 1 + tanh(u) is
# twice sigmoid(2 u), which keeps its digits where the tanh is near -1.
LINEAR = 2 * math.sqrt(2 / math.pi) * LOG2E
CUBIC = 0.044715 * LINEAR


def sigmoid(y: Array) -> Array:
    """1 / (1 + exp(-y))."""
    return sigmoid_base2(y * -LOG2E)


def sigmoid_base2(exponent: Array) -> Array:
    """1 / (1 + 2^exponent)."""
    root = lax.rsqrt(1.0 + jnp.exp2(exponent))
    return root * root


def gelu(x: Array) -> Array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (x * x * -CUBIC - LINEAR)))
    return x * (root * root)


def one_minus_square(log2_a: Array, a: Array) -> Array:
    """1 - a^2 for a = exp2(log2_a) <= 1, also near 1."""
    quotient = jnp.full_like(log2_a, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        quotient = quotient * log2_a + float(coefficient)
    return jnp.where(log2_a > NEAR_ONE, log2_a * quotient, 1.0 - a * a)


def inverse_root(z: Array) -> Array:
    """1 / sqrt(z), finite for z >= 0.

    The compiler sees that this sum is a normal number, and leaves out the steps that make rsqrt right for
    others; it does not see that of a maximum.
    """
    return lax.rsqrt(jnp.abs(z) + TINY)
