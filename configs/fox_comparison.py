"""The FoX paper's comparison at a small scale: FoX and Transformer, Pro and LLaMA, on the same text.

    python -m launch.sweep configs/fox_comparison.py --runs=runs/fox_comparison --minutes=8.5

Every architecture has the same recipe and the same choice of learning rate: three trials of 5 Mi tokens over
the paper's grid {1, 2, 5} x 10^i; the rate with the lowest held-out loss trains one epoch, 64 Mi of the 64.3
Mi tokens of the text, each seen once. Two seeds for FoX (Pro) and Transformer (Pro), and one FoX (Pro)
without pruning.

How long: 7 x 67.1 M + 12 x 5.2 M = 533 M tokens; 17.5 minutes on one H100, in two commands.

Arguments of the file (all optional):
  text, tokenizer: shards (with train/ and held_out/ in it) and the tokenizer.json they were made with.
  size, ctx, vocab, batch: of every model and run, see `configs/lm.py`.
  tokens, trial: of a full run, and of a trial; m = 2^20.
"""

from typing import Any

from configs.common import parse_args
from configs.lm import ARCHS

RATES = ("1e-3", "2e-3", "5e-3")
# name -> architecture, seed, pruning. In the order they are run: what matters most comes first.
RUNS: dict[str, tuple[str, int, bool]] = {
    "fox_pro-0": ("fox_pro", 0, True),
    "transformer_pro-0": ("transformer_pro", 0, True),
    "fox_llama-0": ("fox_llama", 0, True),
    "transformer_llama-0": ("transformer_llama", 0, True),
    "fox_pro-0-exact": ("fox_pro", 0, False),
    "fox_pro-1": ("fox_pro", 1, True),
    "transformer_pro-1": ("transformer_pro", 1, True),
}
# A trial is judged by its held-out loss alone; its weights are saved at its end, or when it is stopped.
TRIAL = {
    "train.eval_every": 0,
    "eval.documents": 0,
    "eval.pruning_documents": 0,
    "eval.final_tokens": 0,
    "checkpoint.every": 1_000_000,
}


def get_sweep(arg: str | None = None) -> list[dict[str, Any]]:
    """The runs, in order; see `launch/sweep.py` for what each key means."""
    args = parse_args(
        arg,
        text="data/text/shards",
        tokenizer="data/text/tokenizer.json",
        size="45m",
        ctx=8192,
        vocab=16384,
        batch=4,
        tokens="64m",
        trial="5m",
    )

    def config(arch: str, seed: int, tokens: str, acp: bool = True) -> str:
        values = {
            "arch": arch,
            "size": args.size,
            "ctx": args.ctx,
            "batch": args.batch,
            "tokens": tokens,
            "data": "text",
            "path": f"{args.text}/train",
            "held_out": f"{args.text}/held_out",
            "tokenizer": "hf",
            "tokenizer_path": args.tokenizer,
            "vocab": args.vocab,
            "acp": acp,
            "seed": seed,
        }
        file = "fox" if arch.startswith("fox") else "transformer"
        return f"configs/{file}.py:" + ",".join(f"{key}={value}" for key, value in values.items())

    common = {"eval.sample_tokens": 0, "eval.ngram_bytes": 0}
    trials = [
        {
            "name": f"trial-{arch}-{rate}",
            "task": "lm",
            "config": config(arch, 0, args.trial),
            "set": {**common, **TRIAL, "optim.peak_lr": rate},
        }
        for arch in ARCHS
        for rate in RATES
    ]
    runs = [
        {
            "name": name,
            "task": "lm",
            "config": config(arch, seed, args.tokens, acp),
            "set": common,
            "choose": {"optim.peak_lr": [f"trial-{arch}-{rate}" for rate in RATES]},
            "by": "validation/loss",
        }
        for name, (arch, seed, acp) in RUNS.items()
    ]
    return [*trials, *runs]
