"""Static description of a call."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as dispatch sees it: everything an implementation may refuse.

    Attributes:
      platform, capability, device: what the program is compiled for (`kernels.common.dispatch.Target`).
      dtype: of x and of the results.
      kernel_dtype, bias_dtype: of the parameters.
      rows: R, of x.
      width: D, channels of x.
      features: F, of each result.
      parts: P, how many results.
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
        return f"R{self.rows} D{self.width} F{self.features} P{self.parts} {self.dtype} on {self.device}"
