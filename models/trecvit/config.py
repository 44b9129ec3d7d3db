"""What a TRecViT is (`TRecViTConfig`, `MAEConfig`) and how it is run (`TRecViTRuntime`)."""

import dataclasses
from typing import Any, Literal, Self

from models.common.config import VIT_SIZES, VideoRuntime, one_of, require, vit_size
from models.common.vit import Grid, grid_of

Pool = Literal["tok", "gap"]
Positions = Literal["learn", "sincos2d"]
Head = Literal["classes", "readout", "dense", "none"]

SIZES = tuple(VIT_SIZES)


@dataclasses.dataclass(frozen=True)
class TRecViTConfig:
    """Architecture only.

    Attributes:
      image_size: (height, width) of the frames in pixels; multiples of the patch size.
      patch_size: (height, width) of a patch in pixels.
      width, depth, mlp_size, num_heads: D, L, F, N. The gates' maps have N diagonal blocks.
      state_multiplier: E / D, width of the recurrence over the model's: 1 in the paper, 2 in the release.
      conv_width: J, frames the temporal convolution sees.
      min_rad: smallest radius of the recurrence at initialisation (0.6 in the paper, 0.5 in the release).
      positions: "learn" (a table for `image_size`) or "sincos2d" (fixed).
      pool: "tok", a class token per frame, or "gap", the mean over the patches.
      use_mlp, channel_mlp_size: a gated MLP after the recurrent block, as in Griffin, and its hidden size
        (None: `mlp_size`). TRecViT has none.
      dropout: rate inside the ViT blocks.
      head: "classes" (tanh features averaged over time, the released model's), "readout" (attention pooling,
        for frozen features), "dense" (classes per patch and frame) or "none" (features).
      num_classes, rep_size: C, R; R is the width of the pre-logits of "classes".
      head_dropout: rate before the classifier (0.1 in the paper's Something-Something recipe).
      frames_per_clip: longer videos are cut into floor(T / frames_per_clip) equal clips, whose results are
        averaged (output "clip").
    """

    image_size: Grid = (224, 224)
    patch_size: Grid = (16, 16)
    width: int = 768
    depth: int = 12
    mlp_size: int = 3072
    num_heads: int = 12
    state_multiplier: int = 1
    conv_width: int = 4
    min_rad: float = 0.6
    positions: Positions = "learn"
    pool: Pool = "tok"
    use_mlp: bool = False
    channel_mlp_size: int | None = None
    dropout: float = 0.0
    head: Head = "classes"
    num_classes: int = 400
    rep_size: int = 3072
    head_dropout: float = 0.0
    frames_per_clip: int = 32

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            pair = isinstance(value, tuple | list) and len(value) == 2
            require(pair, name, value, "a pair (height, width)")
            object.__setattr__(self, name, tuple(value))
        sizes = ("width", "depth", "mlp_size", "num_heads", "state_multiplier", "conv_width")
        for name in (*sizes, "num_classes", "rep_size", "frames_per_clip"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name, allowed in (("positions", Positions), ("pool", Pool), ("head", Head)):
            one_of(name, getattr(self, name), allowed)
        for name in ("dropout", "head_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(
            self.width % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"a divisor of width = {self.width}",
        )
        require(
            0 <= self.min_rad < 0.999, "min_rad", self.min_rad, "in [0, 0.999): 0.999 is the largest radius"
        )
        require(
            self.positions == "learn" or (self.width % 4 == 0 and self.width >= 8),
            "positions",
            self.positions,
            f"'learn' for width = {self.width} ('sincos2d' needs a multiple of 4 from 8 on)",
        )
        require(
            self.channel_mlp_size is None or (self.use_mlp and self.channel_mlp_size >= 1),
            "channel_mlp_size",
            self.channel_mlp_size,
            "None, or at least 1 with use_mlp",
        )
        try:
            grid_of(self.image_size, self.patch_size)
        except ValueError as error:
            raise ValueError(f"image_size = {self.image_size}: {error}") from None

    @property
    def grid(self) -> Grid:
        """Patches along height and width."""
        return grid_of(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """P: tokens of a frame, the class token included."""
        return self.num_patches + (self.pool == "tok")

    @property
    def recurrent_width(self) -> int:
        """E."""
        return self.width * self.state_multiplier

    @property
    def channel_mlp(self) -> int | None:
        """Hidden size of the recurrent block's gated MLP; None without one."""
        if not self.use_mlp:
            return None
        return self.mlp_size if self.channel_mlp_size is None else self.channel_mlp_size

    @classmethod
    def preset(cls, size: str, **options: Any) -> Self:
        """A model of the table: mu, Ti, S, M, B, L, So400m, H, g, g-opt, G, G-opt or e; the paper's options.

        The released model is `preset("B", state_multiplier=2, min_rad=0.5)`.

        Args:
          options: further fields, or others than the table's.

        Raises:
          ValueError: unknown size, or a field with a wrong value.
        """
        fields: dict[str, Any] = {**vit_size(size), **options}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    """A masked auto-encoder: a TRecViT that sees few tubes of patches, and a small one that paints the rest.

    The paper gives the mask (0.9 of the tubes) and "the same recipe as VideoMAE"; the decoder's sizes are
    VideoMAE's. Its layers are those of the encoder, so it is causal too.

    Attributes:
      encoder: the model to pre-train; its head must be "none".
      mask_ratio: share of the tubes the encoder does not see.
      decoder_width, decoder_depth, decoder_heads: None: half the encoder's width, and half its heads (at
        least 1). The MLP is four times the width.
    """

    encoder: TRecViTConfig = dataclasses.field(default_factory=lambda: TRecViTConfig(head="none"))
    mask_ratio: float = 0.9
    decoder_width: int | None = None
    decoder_depth: int = 4
    decoder_heads: int | None = None

    def __post_init__(self) -> None:
        require(self.encoder.head == "none", "encoder.head", self.encoder.head, "'none'")
        require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "between 0 and 1")
        require(
            self.num_kept >= 1,
            "mask_ratio",
            self.mask_ratio,
            f"smaller: none of the {self.encoder.num_patches} tubes would be left",
        )
        try:
            _ = self.decoder
        except ValueError as error:
            raise ValueError(f"the decoder of MAEConfig: {error}") from None

    @property
    def num_kept(self) -> int:
        """Tubes the encoder sees: N - int(ratio N), as in VideoMAE."""
        patches = self.encoder.num_patches
        return patches - int(self.mask_ratio * patches)

    @property
    def decoder(self) -> TRecViTConfig:
        """The decoder as a model of its own: fixed positions, every patch a token."""
        width = self.encoder.width // 2 if self.decoder_width is None else self.decoder_width
        heads = max(self.encoder.num_heads // 2, 1) if self.decoder_heads is None else self.decoder_heads
        return dataclasses.replace(
            self.encoder,
            width=width,
            depth=self.decoder_depth,
            num_heads=heads,
            mlp_size=4 * width,
            channel_mlp_size=None,
            positions="sincos2d",
            pool="gap",
        )


@dataclasses.dataclass(frozen=True)
class TRecViTRuntime(VideoRuntime):
    """How a TRecViT is run: see `VideoRuntime`."""
