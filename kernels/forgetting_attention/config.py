"""Static choices of forgetting attention: tile sizes and everything else that is fixed when the program is
traced.
"""

import dataclasses

Tile = tuple[int, int]

# What implementations call out and lse for remat policies (`jax.ad_checkpoint.checkpoint_name`): one that
# keeps the two spares the backward pass a second forward kernel.
RESIDUAL_NAMES = ("forgetting_attention_out", "forgetting_attention_lse")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes as (rows, columns) = (queries, keys), separately for the three passes.

    With pruning, a pass skips whole tiles, so tile sizes decide what is pruned: forward tiles decide out
    and lse, backward_kv tiles dk, dv and the column part of the gate gradient, backward_q tiles dq and the
    row part.

    Attributes:
      forward: tile of the forward pass.
      backward_kv: tile of the pass that computes dk and dv (loops over row blocks for one column block).
      backward_q: tile of the pass that computes dq (loops over column blocks for one row block).
      heads_per_step: how many query heads `xla_chunked` processes together (at most; it takes the largest
        count that fits the head grouping). More suits accelerators; 1 lets every head skip its own tiles.
        Results do not depend on it.
    """

    forward: Tile = (128, 128)
    backward_kv: Tile = (128, 128)
    backward_q: Tile = (128, 128)
    heads_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("forward", "backward_kv", "backward_q"):
            tile = getattr(self, name)
            if (
                not isinstance(tile, tuple)
                or len(tile) != 2
                or not all(isinstance(size, int) and size > 0 for size in tile)
            ):
                raise ValueError(
                    f"TileConfig.{name} must be (rows, columns), two positive ints; got {tile!r}."
                )
        if not isinstance(self.heads_per_step, int) or self.heads_per_step < 1:
            raise ValueError(
                f"TileConfig.heads_per_step must be a positive int; got {self.heads_per_step!r}."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as dispatch sees it: everything an implementation may refuse."""

    op: str
    platform: str
    capability: str | None
    device: str
    dtype: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    pruning: str = "none"
    packed: bool = False
    left_padded: bool = False
    buffered: bool = False
    tiles: TileConfig | None = None

    def __str__(self) -> str:
        options = [f"pruning={self.pruning}"]
        options += [name for name in ("packed", "left_padded", "buffered") if getattr(self, name)]
        return (
            f"B{self.batch} T{self.queries} S{self.keys} N{self.heads} K{self.kv_heads} H{self.head_dim}"
            f" {self.dtype} on {self.device}, {', '.join(options)}"
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of one call.

    Attributes:
      sm_scale: scale of the scores.
      tight_log_eps: log(eps / keys) of the "tight" pruning rule, None unless that rule is on.
      tiles: tile sizes of the three passes.
      zero_first_gate: whether the gate of key 0 gets an exactly zero gradient, as it decays nothing. Off
        for numeric thresholds: the passes may then prune different entries, and the official kernels leave
        the sum of that difference there.
    """

    sm_scale: float
    tight_log_eps: float | None
    tiles: TileConfig
    zero_first_gate: bool = True
