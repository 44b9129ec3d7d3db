"""Peak arithmetic rates, for model FLOPs utilisation (MFU)."""

from typing import Any

import jax

# Dense bfloat16 matrix FLOP/s of one device, from the vendors' data sheets; matched as part of `device_kind`.
# Longer names first: "TPU v5p" must not be taken for "TPU v5".
_PEAK = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device: Any | None = None) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where it is not known (CPUs, and devices not in the table).

    Args:
      device: a `jax.Device`; None: the first.
    """
    kind = (jax.devices()[0] if device is None else device).device_kind.lower()
    return next((peak for name, peak in _PEAK if name.lower() in kind), None)


def utilisation(units_per_second: float, flops_per_unit: float | None, devices: int) -> float | None:
    """MFU in [0, 1]: useful model FLOP/s over peak, or None where either is unknown.

    Args:
      units_per_second: tokens, frames or clips trained on per second, by all devices together.
      flops_per_unit: FLOPs of forward AND backward pass per unit (3 x the forward pass), recomputation and
        pruning not counted.
      devices: how many devices share the work.
    """
    peak = peak_flops()
    if peak is None or flops_per_unit is None:
        return None
    return units_per_second * flops_per_unit / (peak * devices)
