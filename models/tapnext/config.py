"""What a TAPNext is (`TAPNextConfig`) and how it is run (`TAPNextRuntime`)."""

import dataclasses
from typing import Any, Literal, Self

from models.common.config import VIT_SIZES, VideoRuntime, one_of, require, vit_size
from models.common.gated_gelu import GatedMLPImplementation
from models.common.vit import NORM_EPS, Grid, grid_of

Numerics = Literal["jax", "torch"]

SIZES = tuple(VIT_SIZES)


@dataclasses.dataclass(frozen=True)
class TAPNextConfig:
    """Architecture only; the defaults are those of the released TAPNext-B.

    Attributes:
      image_size: native (height, width) of the frames in pixels; multiples of the patch size. Queries and
        tracks are in pixels of this size whatever the resolution of the video.
      patch_size: (height, width) of a patch in pixels.
      width, depth, mlp_size, num_heads: D, L, F, N. The gates' maps have N diagonal blocks; the gated MLP of
        the recurrent block has hidden size F too.
      lru_width: E, width of the recurrence; None: D.
      conv_width: J, frames the temporal convolution sees.
      min_rad: smallest radius of the recurrence at initialisation.
      head_width: hidden size of the two heads.
      coordinate_bins: classes (along y, along x), bin k being pixel k; None: one per pixel of the image.
      decode_radius, decode_temperature: of the truncated soft-argmax: bins around the largest logit, and what
        the logits are multiplied by.
      query_scale: the table of positions that queries are read from has this many entries per pixel.
      numerics: "jax", as the weights of TAPNext and BootsTAPNext were trained, or "torch", as those of
        TAPNext++. GELU of ViT MLP and heads by tanh | exact; epsilon of the final norm and of the heads'
        1e-6 | 1e-5; positions of queries outside the image (and within half a pixel of its border) clamp to
        the edge | fade to zero.
    """

    image_size: Grid = (256, 256)
    patch_size: Grid = (8, 8)
    width: int = 768
    depth: int = 12
    mlp_size: int = 3072
    num_heads: int = 12
    lru_width: int | None = None
    conv_width: int = 4
    min_rad: float = 0.9
    head_width: int = 256
    coordinate_bins: Grid | None = None
    decode_radius: int = 20
    decode_temperature: float = 0.5
    query_scale: int = 1
    numerics: Numerics = "jax"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "coordinate_bins"):
            value = getattr(self, name)
            if name == "coordinate_bins" and value is None:
                continue
            pair = isinstance(value, tuple | list) and len(value) == 2
            require(pair and min(value) >= 1, name, value, "a pair (height, width), each at least 1")
            object.__setattr__(self, name, tuple(value))
        sizes = ("width", "depth", "mlp_size", "num_heads", "conv_width", "head_width", "query_scale")
        for name in sizes:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.decode_radius >= 0, "decode_radius", self.decode_radius, "at least 0")
        require(self.decode_temperature > 0, "decode_temperature", self.decode_temperature, "positive")
        one_of("numerics", self.numerics, Numerics)
        require(
            self.width % 4 == 0 and self.width >= 8,
            "width",
            self.width,
            "a multiple of 4 from 8 on (a quarter of the channels for sine and cosine of x and of y each)",
        )
        for name, value in (("width", self.width), ("lru_width", self.recurrent_width)):
            divides = value >= 1 and value % self.num_heads == 0
            require(divides, name, value, f"a multiple of num_heads = {self.num_heads}")
        require(
            0 <= self.min_rad < 0.999, "min_rad", self.min_rad, "in [0, 0.999): 0.999 is the largest radius"
        )
        try:
            grid_of(self.image_size, self.patch_size)
        except ValueError as error:
            raise ValueError(f"image_size = {self.image_size}: {error}") from None

    @property
    def grid(self) -> Grid:
        """Patches along height and width at the native size."""
        return grid_of(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a frame of the native size."""
        return self.grid[0] * self.grid[1]

    @property
    def recurrent_width(self) -> int:
        """E."""
        return self.width if self.lru_width is None else self.lru_width

    @property
    def bins(self) -> Grid:
        """Classes along y and x; the logits hold those of y first."""
        return self.image_size if self.coordinate_bins is None else self.coordinate_bins

    @property
    def approximate_gelu(self) -> bool:
        """Whether ViT MLP and heads use the GELU by tanh."""
        return self.numerics == "jax"

    @property
    def head_eps(self) -> float:
        """Epsilon of the final norm and of the heads' norms."""
        return NORM_EPS if self.numerics == "jax" else 1e-5

    @classmethod
    def preset(cls, size: str, **options: Any) -> Self:
        """A model of the ViT ladder: mu, Ti, S, M, B, L, So400m, H, g, g-opt, G, G-opt or e.

        B is the released one (194,202,881 parameters). S is the paper's small one, of 56M parameters: that is
        a recurrence as wide as B's (56.6M; at its own width it would have 49.5M). The others are rungs of the
        official code's table that nobody has published weights or results of.

        Args:
          options: further fields, or others than the table's.

        Raises:
          ValueError: unknown size, or a field with a wrong value.
        """
        fields: dict[str, Any] = dict(vit_size(size))
        if size == "S":
            fields["lru_width"] = VIT_SIZES["B"][0]
        return cls(**fields | options)


@dataclasses.dataclass(frozen=True)
class TAPNextRuntime(VideoRuntime):
    """How a TAPNext is run: see `VideoRuntime`. Queries, heads and coordinates are float32 all the same.

    Attributes:
      gated_mlp: implementation of the recurrent blocks' gated MLP in inference, with joined parameters
        (`prepare_params`): "xla", or "pallas_mosaic_gpu" on one Hopper GPU in 16 bits
        (`kernels.gated_matmul`); None chooses. Training always has XLA's.
    """

    gated_mlp: GatedMLPImplementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gated_mlp is not None:
            one_of("gated_mlp", self.gated_mlp, GatedMLPImplementation)
        require(
            self.gated_mlp != "pallas_mosaic_gpu" or self.compute_dtype in ("bfloat16", "float16"),
            "gated_mlp",
            self.gated_mlp,
            f"'xla' or None with compute_dtype={self.compute_dtype!r} (the kernel needs 16 bits)",
        )
