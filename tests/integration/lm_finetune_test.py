"""Fine-tuning starts where the given checkpoint stands: at its evaluated loss."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from models import fox
from tasks.common.errors import ConfigError
from tasks.lm import eval as evaluation
from tests.integration.lm_runs import EVALUATED, TINY, held_out, losses, run, write_texts

FIRST = ("--config.eval.validation_batches=1000", "--config.train.eval_at_start=true")
CONFIG = fox.FoxConfig(
    vocab_size=259, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, hidden_ratio=3.5,
    qk_norm=True, use_k_shift=True, use_v_shift=True, use_output_norm=True, use_output_gate=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOXTROT_CACHE", str(tmp_path / "cache"))


def _official(folder: Path) -> Path:
    """A checkpoint in the official format whose predictions are far from uniform."""
    params = fox.init_params(CONFIG, jax.random.key(3))
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] * 40
    fox.convert.save_official(folder, params, CONFIG)
    return folder


def _held_out_loss(tmp_path: Path, *what: str, texts: Path) -> float:
    """`tasks.lm.eval` on the held-out text, in nats per token."""
    output = tmp_path / "evaluated"
    evaluation.main(
        [*what, f"--output={output}", "--length=64", "--stats_documents=0", "--max_documents=2",
         f"--config=configs/fox.py:size=tiny,ctx=64,batch=4,data=text,path={texts},vocab=259", *TINY]
    )  # fmt: skip
    return json.loads((output / "summary.json").read_text())["models"]["official"]["held_out"]["loss"]


@pytest.mark.slow
def test_fine_tuning_starts_at_the_checkpoints_loss(tmp_path: Path) -> None:
    """An official checkpoint, evaluated by the command, then fine-tuned: the first figure is that one."""
    texts, checkpoint = write_texts(tmp_path / "texts"), _official(tmp_path / "official")
    expected = _held_out_loss(tmp_path, f"--checkpoint={checkpoint}", texts=texts)
    assert expected > 6  # random predictions would give ln 259 = 5.56
    records = run(
        tmp_path / "run", *EVALUATED, *FIRST,
        f"--config.train.init_from={checkpoint}", args=f"data=text,path={texts},vocab=259",
    )  # fmt: skip
    start = next(r for r in records if r["kind"] == "eval" and r["step"] == 0)
    assert start["validation/loss"] == pytest.approx(expected, rel=1e-6)
    assert held_out(records)["loss"] < expected - 1

    # A run of ours serves as well, and starts where it ended.
    again = run(
        tmp_path / "again", *EVALUATED, *FIRST,
        f"--config.train.init_from={tmp_path / 'run'}", "--config.train.steps=2",
        args=f"data=text,path={texts},vocab=259",
    )  # fmt: skip
    start = next(r for r in again if r["kind"] == "eval" and r["step"] == 0)
    assert start["validation/loss"] == pytest.approx(held_out(records)["loss"], rel=1e-6)
    assert np.isfinite(losses(again)).all()


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    checkpoint = _official(tmp_path / "official")
    with pytest.raises(ConfigError, match=r"another model than config\.model[\s\S]*use_rope: False -> True"):
        run(
            tmp_path / "run", f"--config.train.init_from={checkpoint}",
            args=f"arch=transformer_pro,data=text,path={write_texts(tmp_path / 'texts')},vocab=259",
        )  # fmt: skip
