"""Small texts, and small runs of the real training command on them, for the integration tests."""

import gzip
import json
from pathlib import Path

import numpy as np

from tasks.common.writer import read_records
from tasks.lm import train

SENTENCE = "a fox ran over the dog and then it was gone while rain fell on green hills near old stone walls"
WORDS = SENTENCE.split()

# A layer of width 32 at 64 tokens. Compiling is what costs: no evaluation or samples unless a test asks.
TINY = (
    "--config.model.num_layers=1",
    "--config.train.eval_every=0",
    "--config.eval.documents=0",
    "--config.eval.validation_batches=0",
    "--config.eval.final_tokens=0",
    "--config.eval.sample_tokens=0",
    "--config.log.progress=false",
)
# Evaluations of every kind, samples included, on a little text.
EVALUATED = (
    "--config.eval.length=0",
    "--config.eval.documents=2",
    "--config.eval.validation_batches=2",
    "--config.eval.batch_size=2",
    "--config.eval.final_tokens=512",
    "--config.eval.sample_tokens=4",
)


def document(seed: int, words: int = 160) -> str:
    """Text with something to learn: sentences of few words, by a seeded walk."""
    rng = np.random.default_rng(seed)
    picked = [WORDS[i] for i in rng.integers(0, len(WORDS), words)]
    return " ".join(w + ("." if i % 9 == 8 else "") for i, w in enumerate(picked)) + "\n"


def write_texts(folder: Path, count: int = 24) -> Path:
    """A folder of plain text, half of it as gzipped JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    half = count // 2
    for seed in range(half):
        (folder / f"{seed:02d}.txt").write_text(document(seed), encoding="utf-8")
    with gzip.open(folder / "rest.jsonl.gz", "wt", encoding="utf-8") as lines:
        for seed in range(half, count):
            lines.write(json.dumps({"text": document(seed)}) + "\n")
    return folder


def run(workdir: Path, *options: str, config: str = "configs/fox.py", args: str = "") -> list[dict]:
    """`python -m tasks.lm.train` in this process: a tiny model, 20 steps unless the options say otherwise.

    Returns:
      The records of metrics.jsonl.
    """
    arguments = f"size=tiny,ctx=64,batch=4,tokens=5120{',' if args else ''}{args}"
    train.main([f"--config={config}:{arguments}", f"--workdir={workdir}", *TINY, *options])
    return read_records(workdir)


def losses(records: list[dict]) -> list[float]:
    """Training loss of every step, in order."""
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(len(steps)))
    return [r["loss"] for r in steps]


def held_out(records: list[dict], name: str = "validation") -> dict[str, float]:
    """The last evaluation of that name, without its prefix."""
    found = [r for r in records if r["kind"] == "eval" and f"{name}/loss" in r][-1]
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(name)}
