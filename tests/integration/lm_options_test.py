"""Every architecture, option and recipe of the language models trains through the real command."""

import math
from pathlib import Path

import pytest

from tests.integration.lm_runs import losses, run, write_texts

OPTIONS = {
    "fox_pro": (),
    "fox_llama": ("arch=fox_llama",),
    "transformer_pro": ("arch=transformer_pro",),
    "transformer_llama": ("arch=transformer_llama",),
    "bias_only": ("--config.model.fgate_type=bias_only",),
    "fixed_gates": (
        "--config.model.fgate_type=fixed",
        "--config.model.fgate_bias_init=true",
        "--config.model.decay_time_min=2",
        "--config.model.decay_time_max=64",
    ),
    "gqa_rope": ("--config.model.num_kv_heads=1", "--config.model.use_rope=true"),
    "shared_qk_norm": ("--config.model.qk_norm_share_param_across_head=true",),
    "tight_pruning": ("--config.runtime.adaptive_threshold=tight",),
    "no_pruning": ("acp=false",),
    "bfloat16_scan_full_remat": (
        "--config.model.num_layers=2",
        "--config.runtime.compute_dtype=bfloat16",
        "--config.runtime.scan_layers=true",
        "--config.runtime.remat=full",
    ),
    "dots_remat": ("--config.runtime.remat=dots",),
    "attention_remat": ("--config.runtime.remat=attention",),
    "windows": ("--config.data.mode=windows",),
    "micro_batches": ("--config.train.micro_batch=1",),
    "small_loss_chunks": ("--config.train.loss_chunk=7",),
    "no_clip_wsd": (
        "--config.optim.clip_norm=none",
        "--config.optim.schedule=wsd",
        "--config.optim.decay=1024",
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOXTROT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _train(name: str, texts: Path, workdir: Path, *more: str) -> list[float]:
    args = [f"data=text,path={texts},vocab=259", *(o for o in OPTIONS[name] if not o.startswith("--"))]
    options = [o for o in OPTIONS[name] if o.startswith("--")]
    return losses(run(workdir, *options, *more, args=",".join(args)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_option_trains(name: str, texts: Path, tmp_path: Path) -> None:
    """20 steps on bytes: from about ln 259 to well below it."""
    found = _train(name, texts, tmp_path)
    assert len(found) == 20
    assert all(map(math.isfinite, found))
    assert found[0] == pytest.approx(math.log(259), abs=0.1)
    assert sum(found[-5:]) / 5 < found[0] - 0.5


@pytest.mark.slow
def test_micro_batches_equal_the_whole_batch(texts: Path, tmp_path: Path) -> None:
    """Rows of a packed batch have different numbers of labels; weighting makes the sums agree."""
    whole = _train("fox_pro", texts, tmp_path / "whole")
    parts = _train("micro_batches", texts, tmp_path / "parts")
    assert parts == pytest.approx(whole, abs=2e-4)


@pytest.mark.slow
def test_scanning_layers_changes_not_a_bit(texts: Path, tmp_path: Path) -> None:
    """What a resumed run may switch leaves the loss log as it is, to the last bit."""
    layers = "--config.model.num_layers=2"
    plain = _train("fox_pro", texts, tmp_path / "plain", layers)
    scanned = _train("fox_pro", texts, tmp_path / "scanned", layers, "--config.runtime.scan_layers=true")
    assert scanned == plain
