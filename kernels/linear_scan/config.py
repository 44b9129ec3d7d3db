"""Constants and static descriptions of the linear scans."""

import dataclasses

# What implementations call h and h_last for remat policies (`jax.ad_checkpoint.checkpoint_name`): one that
# keeps them spares the backward pass a second scan.
RESIDUAL_NAMES = ("linear_scan_h", "linear_scan_h_last")

# log a = -DECAY_SCALE sigmoid(gate_a) softplus(a_param): "c" of the RG-LRU.
DECAY_SCALE = 8.0

# Largest derivative of the input multiplier sqrt(1 - a^2) with respect to 1 - a^2.
MAX_SQRT_GRADIENT = 1000.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as dispatch sees it: everything an implementation may refuse.

    Attributes:
      op: "linear_scan" or "rglru_scan".
      platform, capability, device: what the program is compiled for (`kernels.common.dispatch.Target`).
      dtype: of x; h has it too.
      decay_dtype: of a, or of the gates' pre-activations.
      batch, length, width: sizes of x [B, T, D].
      reverse: whether time runs backwards.
      has_state: whether h0 is given.
      has_reset: whether reset is given (rglru_scan only).
    """

    op: str
    platform: str
    capability: str | None
    device: str
    dtype: str
    decay_dtype: str
    batch: int
    length: int
    width: int
    reverse: bool = False
    has_state: bool = False
    has_reset: bool = False

    def __str__(self) -> str:
        words = [f"B{self.batch} T{self.length} D{self.width} {self.dtype} (decay {self.decay_dtype})"]
        flags = {"reverse": self.reverse, "h0": self.has_state, "reset": self.has_reset}
        return ", ".join([f"{words[0]} on {self.device}", *(name for name, on in flags.items() if on)])
