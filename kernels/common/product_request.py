"""Calls of products y = x W + b as dispatch sees them, and the checks of their arguments."""

import dataclasses
import math
from typing import Any, Self

from kernels.common.dispatch import target

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class ProductRequest:
    """A call: everything an implementation may refuse.

    Attributes:
      platform, capability, device: what the program is compiled for (`kernels.common.dispatch.Target`).
      dtype: of x and of the results.
      kernel_dtype, bias_dtype: of the parameters.
      rows: R, of x.
      width: D, channels of x.
      features: F, columns of each of the matrix's parts.
      parts: how many parts the matrix has, side by side.
    """

    platform: str
    capability: str | None
    device: str
    dtype: str
    kernel_dtype: str
    bias_dtype: str
    rows: int
    width: int
    features: int
    parts: int

    def __str__(self) -> str:
        return f"R{self.rows} D{self.width} F{self.features} {self.dtype} on {self.device}"

    @classmethod
    def of(cls, x: Any, kernel: Any, bias: Any, parts: int) -> Self:
        """Of these arrays, or of their shapes and dtypes."""
        device = target()
        return cls(
            device.platform, device.capability, device.kind, str(x.dtype), str(kernel.dtype), str(bias.dtype),
            rows=math.prod(x.shape[:-1]), width=x.shape[-1], features=kernel.shape[1] // parts, parts=parts,
        )  # fmt: skip


def check_product(op: str, x: Any, kernel: Any, bias: Any, parts: int, columns: str, whole: str) -> None:
    """Raises ValueError unless these fit together.

    Args:
      op: for messages, as are
      columns: what the matrix's are in the op's letters, such as "2 F", and
      whole: which numbers of them there may be, such as "an even number".
    """
    for name, array in {"x": x, "kernel": kernel, "bias": bias}.items():
        if str(getattr(array, "dtype", None)) not in DTYPES:
            got = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"{op}: {name} has dtype {got}; use one of {', '.join(DTYPES)}.")
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"{op}: x must be [..., D] without an empty axis; got shape {x.shape}.")
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1] or kernel.shape[1] % parts or not kernel.shape[1]:
        raise ValueError(
            f"{op}: kernel must be [D, {columns}] = [{x.shape[-1]}, {whole}]; got shape {kernel.shape}."
        )
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"{op}: bias must be [{columns}] = {kernel.shape[1:]}; got shape {bias.shape}.")
