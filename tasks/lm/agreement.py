"""Whether two implementations of attention train alike: losses of a run under each, and of another seed.

    python -m launch.bench tasks.lm --agreement --output=benchmarks/results/agreement-h200.json

A small byte-level FoX in bfloat16 on the text every Python carries. The second seed draws other initial
parameters and sees the same batches: the distance of two equally good runs measures what rounding may do.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from tasks.common.config import load_config, override_all, with_defaults
from tasks.common.figures import save, smooth
from tasks.common.loop import fit
from tasks.common.writer import read_records
from tasks.lm.config import SCHEMA
from tasks.lm.train import make_job

# The gap between implementations, in multiples of that between seeds.
ALLOWED = 2.0
# Steps at the end of the runs over which the gaps are averaged.
LAST = 100
SEEDS = "another seed"
NOTHING = "-"


def rows(
    *,
    calls: int = 300,
    settings: str = "",
    figure: Path | None = None,
    size: str = "mini",
    length: int = 2048,
    batch: int = 8,
    implementations: tuple[str, str] = ("pallas_mosaic_gpu", "xla_chunked"),
) -> list[dict[str, Any]]:
    """Trains three runs and compares their losses.

    Args:
      calls: steps of each run.
      settings: config values for all of them, "runtime.adaptive_threshold=tight,...".
      figure: PNG to draw.
      size, length, batch: of the model (`configs/lm.py`), and T and B.
      implementations: of attention; the second also runs with the other seed.

    Returns:
      Two rows {case, steps, gap, largest gap, loss, baseline, baseline loss, times, allowed, met}, nats per
      byte over the last 100 steps: mean absolute gap between the implementations, and between the seeds.

    Raises:
      ConfigError: a setting is wrong.
    """
    fast, plain = implementations
    begin = f"configs/fox.py:arch=fox_pro,size={size},ctx={length},batch={batch},data=stdlib,tokenizer=bytes"
    arguments = f"{begin},tokens={calls * batch * length}"
    runs = {
        fast: _losses(arguments, settings, fast, seed=0),
        plain: _losses(arguments, settings, plain, seed=0),
        SEEDS: _losses(arguments, settings, plain, seed=1),
    }
    if figure is not None:
        _plot(runs, figure, implementations)
    by_seed = gap(runs[SEEDS], runs[plain])
    return [_row(fast, plain, runs, by_seed), _row(SEEDS, plain, runs, by_seed)]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the implementations are as close as they must be."""
    row = next(row for row in rows if row["met"] != NOTHING)
    outcome = "holds" if row["met"] == "yes" else "does not hold"
    return f"gap at most {ALLOWED:g} times that between seeds: {outcome} ({row['times']} times)"


def gap(a: Float[np.ndarray, " S"], b: Float[np.ndarray, " S"]) -> float:
    """Mean absolute difference of two runs' losses over their last 100 steps."""
    return float(np.abs(a - b)[-LAST:].mean())


def _losses(arguments: str, settings: str, implementation: str, seed: int) -> Float[np.ndarray, " S"]:
    """Training loss of every step of one run; `seed` draws the initial parameters, not the batches."""
    config = with_defaults(load_config(arguments), SCHEMA)
    fixed = (
        f"runtime.attention_implementation={implementation},runtime.compute_dtype=bfloat16,eval.documents=0,"
        "eval.validation_batches=0,eval.final_tokens=0,eval.sample_tokens=0,checkpoint.every=1000000"
    )
    override_all(config, f"{fixed},{settings}")
    with tempfile.TemporaryDirectory(prefix="agreement") as folder:
        fit(dataclasses.replace(make_job(config, Path(folder)), seed=seed))
        records = read_records(folder)
    return np.array([record["loss"] for record in records if record["kind"] == "train"], np.float64)


def _row(name: str, baseline: str, runs: Mapping[str, np.ndarray], by_seed: float) -> dict[str, Any]:
    ours, theirs = runs[name], runs[baseline]
    times = gap(ours, theirs) / by_seed if by_seed else float("inf")
    judged = name != SEEDS
    return {
        "case": f"{name} against {baseline}",
        "steps": len(ours),
        "gap": round(gap(ours, theirs), 5),
        "largest gap": round(float(np.abs(ours - theirs)[-LAST:].max()), 5),
        "loss": round(float(ours[-LAST:].mean()), 4),
        "baseline": baseline,
        "baseline loss": round(float(theirs[-LAST:].mean()), 4),
        "times": round(times, 3),
        "allowed": ALLOWED if judged else NOTHING,
        "met": ("yes" if times <= ALLOWED else "no") if judged else NOTHING,
    }


def _plot(runs: Mapping[str, np.ndarray], path: Path, implementations: tuple[str, str]) -> None:
    fast, plain = implementations
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = 2 * (max(1, len(runs[plain]) // 40) // 2) + 1
    colours = dict(zip(runs, ("#1f6fb4", "#d9622b", "#3a9a5b"), strict=True))
    styles = {fast: "-", plain: "--", SEEDS: "-"}
    for name, losses in runs.items():
        smoothed = smooth(losses, window)
        label = f"{plain}, {SEEDS}" if name == SEEDS else name
        left.plot(smoothed, label=label, color=colours[name], linestyle=styles[name], linewidth=1.5)
    late = np.concatenate([losses[len(losses) // 20 :] for losses in runs.values()])
    left.set_ylim(late.min() - 0.05 * np.ptp(late), late.max() + 0.05 * np.ptp(late))
    left.set(xlabel="step", ylabel=f"loss (nats per byte, mean over {window} steps)")
    for name, label in ((fast, f"{fast} - {plain}"), (SEEDS, f"{SEEDS} - seed")):
        apart = np.abs(runs[name] - runs[plain])
        shown = np.maximum(smooth(apart, window), 1e-6)
        mean = gap(runs[name], runs[plain])
        right.semilogy(shown, color=colours[name], linewidth=1.5, label=f"|{label}|, last {LAST}: {mean:.2g}")
    right.set(xlabel="step", ylabel="gap (nats per byte)")
    for axes in (left, right):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save(figure, path)
