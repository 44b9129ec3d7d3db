"""What a Forgetting Transformer is (`FoxConfig`) and how it is run (`FoxRuntime`).

Sizes are those of the paper's tables; the RoPE Transformers it is compared with are the same model with gate
type "none" and rotary positions.
"""

import dataclasses
import math
from typing import Any, Literal, Self

from kernels.forgetting_attention import TileConfig
from models.common.config import ComputeDtype, one_of, require
from models.common.stack import Remat

Arch = Literal["fox_llama", "fox_pro", "transformer_llama", "transformer_pro"]
ForgetGate = Literal["full", "bias_only", "fixed", "none"]
Activation = Literal["silu", "sigmoid"]
ThresholdMode = Literal["weights", "auto", "tight"]

# (hidden size, layers, heads of FoX, heads of the Transformer, MLP size or None for the rule). 125m to 760m
# are the paper's; head dim 128 was the better choice for its 760M Transformer. tiny (tests), mini (CPU) and
# 45m (one GPU) are ours.
_SIZES: dict[str, tuple[int, int, int, int, int | None]] = {
    "tiny": (32, 2, 2, 2, 64),
    "mini": (192, 4, 3, 3, 512),
    "45m": (512, 8, 8, 8, None),
    "125m": (768, 12, 12, 12, None),
    "360m": (1024, 24, 16, 16, None),
    "760m": (1536, 24, 24, 12, None),
}
_PRO: dict[str, Any] = {
    "hidden_ratio": 3.5,
    "qk_norm": True,
    "use_k_shift": True,
    "use_v_shift": True,
    "use_output_norm": True,
    "use_output_gate": True,
}


@dataclasses.dataclass(frozen=True)
class FoxConfig:
    """Architecture only. Field names follow the official configuration where it has them.

    Attributes:
      vocab_size, hidden_size, num_layers, num_heads: V, D, L, N; the head dim is H = D / N.
      num_kv_heads: K key/value heads shared by groups of N / K query heads (None: K = N). Forget gates stay
        one per query head.
      hidden_ratio: MLP size F = 256 ceil(int(D hidden_ratio 2/3) / 256), unless `intermediate_size` is given.
      hidden_act: activation of the MLP's gate half.
      norm_eps: of every norm except q_norm and k_norm, which use 1e-5 as the official layer does.
      use_rope, rope_base: rotary positions on q and k, after QK-norm.
      fgate_type: "full" f_t = sigmoid(w x_t + b); "bias_only" f = sigmoid(b), learned; "fixed" the same, not
        trained; "none" f = 1 (plain attention).
      fgate_bias_init, decay_time_min, decay_time_max: for "bias_only" and "fixed": head h starts with decay
        time T_h = -1 / log f, log-spaced between the two. "fixed" needs it, "full" must not set it.
      qk_norm: RMSNorm of q and k over each head, with one weight per head and channel, or, with
        `qk_norm_share_param_across_head`, one weight per channel (what the released checkpoints have).
      use_k_shift, use_v_shift: data-dependent mixing of each projected key (value) with the previous one.
      use_output_norm, use_output_gate, ogate_act: RMSNorm per head, then the gate, on the attention output.
      initializer_range: standard deviation of every kernel and of the embedding at initialisation.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    hidden_ratio: float = 4.0
    intermediate_size: int | None = None
    hidden_act: Activation = "silu"
    norm_eps: float = 1e-6
    use_rope: bool = False
    rope_base: float = 500000.0
    fgate_type: ForgetGate = "full"
    fgate_bias_init: bool = False
    decay_time_min: float | None = None
    decay_time_max: float | None = None
    qk_norm: bool = False
    qk_norm_share_param_across_head: bool = False
    use_k_shift: bool = False
    use_v_shift: bool = False
    use_output_norm: bool = False
    use_output_gate: bool = False
    ogate_act: Activation = "sigmoid"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        one_of("hidden_act", self.hidden_act, Activation)
        one_of("ogate_act", self.ogate_act, Activation)
        one_of("fgate_type", self.fgate_type, ForgetGate)
        require(
            self.hidden_size % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"a divisor of hidden_size = {self.hidden_size}",
        )
        require(
            self.num_kv_heads is None
            or (1 <= self.num_kv_heads <= self.num_heads and self.num_heads % self.num_kv_heads == 0),
            "num_kv_heads",
            self.num_kv_heads,
            f"None or a divisor of num_heads = {self.num_heads}",
        )
        require(self.hidden_ratio > 0, "hidden_ratio", self.hidden_ratio, "positive")
        require(
            self.intermediate_size is None or self.intermediate_size >= 1,
            "intermediate_size",
            self.intermediate_size,
            "None or at least 1",
        )
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "positive")
        require(self.rope_base > 0, "rope_base", self.rope_base, "positive")
        require(self.initializer_range >= 0, "initializer_range", self.initializer_range, "not negative")
        require(
            not self.use_rope or self.head_dim % 2 == 0,
            "use_rope",
            self.use_rope,
            f"False, or an even head dim (hidden_size / num_heads = {self.head_dim})",
        )
        require(
            not (self.use_output_norm and self.use_output_gate) or self.ogate_act == "sigmoid",
            "ogate_act",
            self.ogate_act,
            "'sigmoid' when the output norm and the output gate are both on",
        )
        self._check_gate_init()

    def _check_gate_init(self) -> None:
        low, high = self.decay_time_min, self.decay_time_max
        if self.fgate_bias_init:
            require(
                self.fgate_type in ("bias_only", "fixed"),
                "fgate_bias_init",
                True,
                f"False for fgate_type={self.fgate_type!r} (only 'bias_only' and 'fixed' have such a bias)",
            )
            require(
                low is not None and high is not None and 0 < low <= high,
                "decay_time_min, decay_time_max",
                (low, high),
                "two positive times in tokens, min <= max, when fgate_bias_init is on",
            )
            return
        require(
            self.fgate_type != "fixed",
            "fgate_bias_init",
            False,
            "True for fgate_type='fixed': a gate that is not trained needs its decay times",
        )
        require(
            low is None and high is None,
            "decay_time_min, decay_time_max",
            (low, high),
            "None while fgate_bias_init is off (they would be ignored)",
        )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        """F: `intermediate_size`, or the rule 256 ceil(int(D hidden_ratio 2/3) / 256)."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * math.ceil(int(self.hidden_size * self.hidden_ratio * 2 / 3) / 256)

    @property
    def is_gated(self) -> bool:
        """Whether attention forgets at all."""
        return self.fgate_type != "none"

    @classmethod
    def preset(cls, arch: Arch, size: str, vocab_size: int = 50257) -> Self:
        """A model of the paper's tables (125m, 360m, 760m), or a smaller one of ours (tiny, mini, 45m).

        Raises:
          ValueError: unknown architecture or size.
        """
        one_of("arch", arch, Arch)
        require(size in _SIZES, "size", size, f"one of {sorted(_SIZES)}")
        width, layers, fox_heads, transformer_heads, mlp = _SIZES[size]
        family, flavour = arch.split("_")
        options = dict(_PRO) if flavour == "pro" else {}
        if family == "transformer":
            options |= {"fgate_type": "none", "use_rope": True}
        return cls(
            vocab_size=vocab_size,
            hidden_size=width,
            num_layers=layers,
            num_heads=fox_heads if family == "fox" else transformer_heads,
            intermediate_size=mlp,
            **options,
        )


@dataclasses.dataclass(frozen=True)
class FoxRuntime:
    """How a model is run; nothing here changes what it computes beyond rounding (and pruned mass below eps).

    Attributes:
      compute_dtype: dtype of matmuls and attention inputs. Parameters, residual stream, norms' statistics and
        gates stay in float32.
      remat: what the backward pass recomputes. "none" nothing; "full" everything but each layer's input;
        "dots" everything but the results of matmuls and of the attention kernel; "attention" everything but
        the latter.
      scan_layers: run the layers as one `lax.scan` (compile time independent of depth). Loss and gradients
        are bitwise those of the unrolled form in float32 on CPU; a run may switch it on resume.
      attention_implementation: passed to the kernel: None chooses, a name insists, a tuple is an ordered
        list.
      log_pruning_tolerance: log eps of Adaptive Computation Pruning; None switches pruning off, -10 is the
        published value.
      adaptive_threshold: where ACP's bound on the scores comes from. "weights": from the QK-norm weights
        (data independent), or "auto" for models without QK-norm; "auto": largest norms of q and k; "tight":
        the kernel's tighter bound.
      tiles: tile sizes of the kernel; None lets it choose.
    """

    compute_dtype: ComputeDtype = "float32"
    remat: Remat = "none"
    scan_layers: bool = False
    attention_implementation: str | tuple[str, ...] | None = None
    log_pruning_tolerance: float | None = None
    adaptive_threshold: ThresholdMode = "weights"
    tiles: TileConfig | None = None

    def __post_init__(self) -> None:
        one_of("compute_dtype", self.compute_dtype, ComputeDtype)
        one_of("remat", self.remat, Remat)
        one_of("adaptive_threshold", self.adaptive_threshold, ThresholdMode)
        require(
            self.log_pruning_tolerance is None or self.log_pruning_tolerance < 0,
            "log_pruning_tolerance",
            self.log_pruning_tolerance,
            "None or negative (it is a log probability; -10 is recommended)",
        )
