"""What the configurations of several rooms share: checks of their fields, the ViT's sizes, the runtime."""

import dataclasses
from typing import Any, Literal, get_args

from models.common.attention import AttentionImplementation

ComputeDtype = Literal["float32", "bfloat16", "float16", "float64"]
VideoRemat = Literal["none", "full", "dots"]

# Width, depth, MLP size, heads. TRecViT's paper lists S, B and L; the others are the released code's table.
VIT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


@dataclasses.dataclass(frozen=True)
class VideoRuntime:
    """How a video model is run; nothing here changes what it computes beyond rounding.

    Attributes:
      compute_dtype: dtype of matmuls and of what flows between them. Parameters, norms' statistics, softmax,
        gates and the recurrence stay in float32.
      residual_dtype: dtype of the residual stream.
      remat: what the backward pass recomputes: "none" nothing, "full" everything but each layer's input,
        "dots" everything but the results of matmuls and of the scan.
      scan_layers: run the layers as one `lax.scan` (compile time independent of depth).
      scan_implementation: passed to the scan: None chooses, a name insists, a tuple is an ordered list.
      attention_implementation: of `jax.nn.dot_product_attention`: None or "xla"; "cudnn" on a GPU in 16 bits.
    """

    compute_dtype: ComputeDtype = "float32"
    residual_dtype: ComputeDtype = "float32"
    remat: VideoRemat = "none"
    scan_layers: bool = False
    scan_implementation: str | tuple[str, ...] | None = None
    attention_implementation: AttentionImplementation | None = None

    def __post_init__(self) -> None:
        one_of("compute_dtype", self.compute_dtype, ComputeDtype)
        one_of("residual_dtype", self.residual_dtype, ComputeDtype)
        one_of("remat", self.remat, VideoRemat)
        if self.attention_implementation is not None:
            one_of("attention_implementation", self.attention_implementation, AttentionImplementation)
            require(
                self.attention_implementation != "cudnn" or self.compute_dtype in ("bfloat16", "float16"),
                "attention_implementation",
                "cudnn",
                f"None or 'xla' with compute_dtype={self.compute_dtype!r} (cuDNN needs 16 bits)",
            )


def vit_size(size: str) -> dict[str, int]:
    """Fields width, depth, mlp_size and num_heads of a size of the ladder.

    Raises:
      ValueError: unknown size.
    """
    require(size in VIT_SIZES, "size", size, f"one of {list(VIT_SIZES)}")
    return dict(zip(("width", "depth", "mlp_size", "num_heads"), VIT_SIZES[size], strict=True))


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    """Raises ValueError, naming the field, its value and what it must be, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} = {value!r}; it must be {wanted}")


def one_of(name: str, value: object, allowed: Any) -> None:
    """Raises ValueError unless the value is one of a `Literal`'s."""
    require(value in get_args(allowed), name, value, f"one of {list(get_args(allowed))}")
