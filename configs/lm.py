"""What the language-model configs share: sizes, the paper's recipe table, recipes for a laptop and one GPU.

Data only. `configs/fox.py` and `configs/transformer.py` choose the family's defaults and call `lm_config`.

Every value of the paper's runs (section 4 and the released configurations) stands in this file: AdamW (0.9,
0.95), decay 0.1, clipping at 1, warm-up over 2^28 tokens, cosine to 0, 524,288 tokens a step, bf16 matmuls
over float32 weights. Budgets are named as the paper names them; 2.7b is 5,120 steps, 48b is 92,160.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import parse_args

TOKENS_PER_STEP = 32 * 16384
WARMUP_TOKENS = 512 * TOKENS_PER_STEP

# width, layers, heads of FoX, heads of the Transformer, MLP size (None: the paper's rule).
SIZES: dict[str, tuple[int, int, int, int, int | None]] = {
    "tiny": (32, 2, 2, 2, 64),
    "mini": (192, 4, 3, 3, 512),
    "45m": (512, 8, 8, 8, None),
    "125m": (768, 12, 12, 12, None),
    "360m": (1024, 24, 16, 16, None),
    "760m": (1536, 24, 24, 12, None),
}
LAPTOP_SIZES = ("tiny", "mini")

# Budget name -> tokens. The first of a size is its default.
BUDGETS: dict[str, dict[str, int]] = {
    "125m": {"2.7b": 5120 * TOKENS_PER_STEP},
    "360m": {"7.5b": 14336 * TOKENS_PER_STEP},
    "760m": {"48b": 92160 * TOKENS_PER_STEP, "16b": 30720 * TOKENS_PER_STEP},
}
# Peak learning rate of each run of the paper; where the budget changed it, both are listed.
PEAK_LR: dict[tuple[str, str], dict[str, float]] = {
    ("fox_llama", "125m"): {"2.7b": 2e-3},
    ("fox_llama", "360m"): {"7.5b": 2e-3},
    ("fox_llama", "760m"): {"16b": 1e-3, "48b": 1e-3},
    ("fox_pro", "125m"): {"2.7b": 2e-3},
    ("fox_pro", "360m"): {"7.5b": 2e-3},
    ("fox_pro", "760m"): {"16b": 1e-3, "48b": 2e-3},
    ("transformer_llama", "125m"): {"2.7b": 2e-3},
    ("transformer_llama", "360m"): {"7.5b": 2e-3},
    ("transformer_llama", "760m"): {"16b": 1e-3, "48b": 5e-4},
    ("transformer_pro", "125m"): {"2.7b": 2e-3},
    ("transformer_pro", "360m"): {"7.5b": 2e-3},
    ("transformer_pro", "760m"): {"16b": 1e-3, "48b": 1e-3},
}
# Rows of the embedding table by tokenizer, where it is not GPT-2's.
VOCABULARIES = {"bpe": 4096, "bytes": 259}
ARCHS = ("fox_llama", "fox_pro", "transformer_llama", "transformer_pro")
# The single-GPU recipe on text made into shards, as `python -m tasks.lm.data` leaves them in data/text.
TEXT = (
    "path=data/text/shards/train,held_out=data/text/shards/held_out,"
    "tokenizer=hf,tokenizer_path=data/text/tokenizer.json,vocab=16384"
)

TEXT_VARIANTS = {
    family: tuple(f"arch={arch},size=45m,{TEXT}" for arch in ARCHS if arch.startswith(family))
    for family in ("fox", "transformer")
}
PAPER_VARIANTS: dict[str, tuple[str, ...]] = {
    family: tuple(
        f"arch={arch},size={size},tokens={budget},data=longcrawl64,path=data/longcrawl64"
        for (arch, size), rates in PEAK_LR.items()
        if arch.startswith(family)
        for budget in rates
    )
    for family in ("fox", "transformer")
}


def lm_config(arg: str | None, arch: str) -> ConfigDict:
    """The configuration of a language-model run; what it leaves out has its section's default.

    Arguments of the config file (all optional):
      arch: fox_llama, fox_pro, transformer_llama or transformer_pro.
      size: tiny, mini (laptop); 45m (one GPU, text of your own); 125m, 360m, 760m (the paper's).
      ctx: training length T in tokens, e.g. 16k. 0: the size's default.
      tokens: budget of a paper run (2.7b, 7.5b, 16b, 48b), or any number of tokens. "": the size's default.
      batch: sequences per step. 0: the size's default (the paper's sizes keep 524,288 tokens a step).
      data, path: source of text and where it lies, see `tasks/lm/data`. "": embedded text for laptop sizes,
        a folder of text for 45m, longcrawl64 for the paper's.
      held_out: folder of held-out text, for a folder of text. "": a tenth of the documents.
      tokenizer, tokenizer_path: "" chooses the source's default.
      vocab: rows of the embedding table. 0: 4096 with the BPE trained on the embedded text, 259 with bytes,
        50257 otherwise.
      acp: prune attention with tolerance e^-10 (FoX only; changes a row's weights by less than 4.6e-5).
      seed: of initialisation and data order.
    """
    args = parse_args(
        arg,
        arch=arch,
        size="mini",
        ctx=0,
        tokens="",
        batch=0,
        data="",
        path="",
        held_out="",
        tokenizer="",
        tokenizer_path="",
        vocab=0,
        acp=True,
        seed=0,
    )
    for name, value, choices in (("arch", args.arch, ARCHS), ("size", args.size, tuple(SIZES))):
        if value not in choices:
            raise ValueError(f"config argument {name}={value!r}: choose one of {', '.join(choices)}")
    laptop, paper = args.size in LAPTOP_SIZES, args.size in BUDGETS
    source = args.data or ("stdlib" if laptop else "longcrawl64" if paper else "text")
    data = {
        "source": source,
        "path": args.path,
        "validation_path": args.held_out,
        "tokenizer": args.tokenizer or {"stdlib": "bpe", "longcrawl64": "gpt2"}.get(source, "bytes"),
        "tokenizer_path": args.tokenizer_path,
        "mode": "windows" if source == "longcrawl64" else "packed",
    }
    runtime = {
        "compute_dtype": "float32" if laptop else "bfloat16",
        # The released runs recompute everything at 760M and nothing below; "dots" redoes what is cheap.
        "remat": ("full" if args.size == "760m" else "dots") if paper else "none",
        # A scan compiles in half the time and takes less memory, but copies what every layer saves;
        # tasks/lm/README.md says what a GPU with room for it gains by unrolling.
        "scan_layers": paper,
        "log_pruning_tolerance": -10.0 if args.acp and args.arch.startswith("fox") else None,
    }
    sections = {
        "seed": args.seed,
        "model": _model(args.arch, args.size, args.vocab or VOCABULARIES.get(data["tokenizer"], 50257)),
        "runtime": runtime,
        "data": data,
        **(_laptop_recipe if laptop else _paper_recipe if paper else _text_recipe)(args),
    }
    return ConfigDict(sections).lock()


def _model(arch: str, size: str, vocab_size: int) -> dict[str, Any]:
    width, layers, fox_heads, transformer_heads, mlp = SIZES[size]
    fox, pro = arch.startswith("fox"), arch.endswith("pro")
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": fox_heads if fox else transformer_heads,
        "hidden_ratio": 3.5 if pro else 4.0,
        "intermediate_size": mlp,
        "norm_eps": 1e-6,
        "use_rope": not fox,
        "rope_base": 500000.0,
        "fgate_type": "full" if fox else "none",
        "qk_norm": pro,
        "use_k_shift": pro,
        "use_v_shift": pro,
        "use_output_norm": pro,
        "use_output_gate": pro,
        "initializer_range": 0.02,
    }


def _adamw(peak_lr: float, warmup: int, total: int) -> dict[str, Any]:
    return {
        "peak_lr": peak_lr,
        "unit": "tokens",
        "total": total,
        "warmup": warmup,
        "schedule": "cosine",
        "final_lr_fraction": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    }


def _laptop_recipe(args: ConfigDict) -> dict[str, Any]:
    """Minutes on two CPU cores: falling loss, samples and plots, on text every Python carries."""
    length, batch = args.ctx or 256, args.batch or 8
    total = _tokens(args.tokens, {}) or 300 * batch * length
    steps = max(1, total // (batch * length))
    return {
        "optim": _adamw(3e-3, warmup=total // 20, total=total),
        "train": {"steps": steps, "batch_size": batch, "seq_len": length, "eval_every": max(1, steps // 5)},
        "eval": {"length": 4 * length, "sample_every": max(1, steps // 5), "sample_prompt": "def "},
        "checkpoint": {"every": 100},
        "log": {"every": 10},
    }


def _text_recipe(args: ConfigDict) -> dict[str, Any]:
    """Minutes on one GPU: 2,048 steps of 32,768 tokens at 8k context, evaluated to four times that."""
    length, batch = args.ctx or 8192, args.batch or 4
    total = _tokens(args.tokens, {}) or 2048 * batch * length
    steps = max(1, total // (batch * length))
    return {
        "optim": _adamw(2e-3, warmup=total // 10, total=total),
        "train": {"steps": steps, "batch_size": batch, "seq_len": length, "eval_every": max(1, steps // 4)},
        "eval": {
            "length": 4 * length,
            "batch_size": 2,
            "validation_batches": 32,
            "ngram_bytes": 0,
            "pruning_documents": 8,
            "pruning_every": max(1, steps // 16),
        },
        "checkpoint": {"every": max(1, steps // 4), "keep": 2},
        "log": {"every": 10},
    }


def _paper_recipe(args: ConfigDict) -> dict[str, Any]:
    """A run of the paper, or one like it at another context or budget."""
    length = args.ctx or 16384
    batch = args.batch or max(1, TOKENS_PER_STEP // length)
    rates, budgets = PEAK_LR[args.arch, args.size], BUDGETS[args.size]
    budget = args.tokens or next(iter(budgets))
    total = _tokens(budget, budgets)
    # Tokens per device and micro-step of the released configurations.
    micro_batch = max(1, (32768 if args.size == "125m" else 16384) // length)
    return {
        "optim": _adamw(
            rates.get(budget, next(iter(rates.values()))), warmup=min(WARMUP_TOKENS, total), total=total
        ),
        "train": {
            "steps": max(1, total // (batch * length)),
            "batch_size": batch,
            "micro_batch": micro_batch,
            "seq_len": length,
            "eval_every": 500,
        },
        "eval": {"length": 4 * length, "batch_size": 1, "sample_every": 500},
        "checkpoint": {"every": 500},
        "log": {"every": 10},
    }


def _tokens(text: str, budgets: dict[str, int]) -> int:
    """Tokens of a named budget, of a number such as 100m, or 0 for ""."""
    if text in budgets or not text:
        return budgets.get(text, 0)
    return int(parse_args(f"tokens={text}", tokens=0).tokens)
