"""The training benchmark with models that step in milliseconds."""

from pathlib import Path

import jax
import numpy as np
import pytest

from models import fox
from tasks.common.bench import start_training
from tasks.common.errors import ConfigError
from tasks.lm import benchmark
from tasks.lm.benchmark import CASES, Case, Goal

TINY = Case("tiny", "fox_pro", "tiny", 2, 256, 300, goals=(Goal(1.0, 2.0, 3.0), Goal(1.0, 2.0, 1e15)))


@pytest.mark.slow
def test_a_case_is_timed_traced_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark.rows(
        calls=1, only="ACP on", settings="runtime.remat=attention", profile=tmp_path, cases=(TINY,)
    )
    (row,) = rows
    assert row["case"] == "tiny, 2 x 256, ACP on"
    assert "remat attention" in row["implementation"]
    assert row["tokens/s"] == pytest.approx(2 * 256 / row["ms a step"] * 1e3, rel=0.05)
    assert row["loss"] == pytest.approx(np.log(300), rel=0.05)
    assert 0 < row["visited"] <= 1
    assert row["met"] == "required"
    assert "of the window idle" in capsys.readouterr().out
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert benchmark.verdict(rows) == "required: 1 of 1 hold; target: 0 of 1"


def test_heads_start_with_decay_times_from_1_to_512() -> None:
    config = fox.FoxConfig.preset("fox_llama", "mini", vocab_size=64)
    plain = fox.init_params(config, jax.random.key(0))
    slow = benchmark._slow_gates(config)(jax.random.key(0))
    gate = slow["layers"]["2"]["attn"]["fgate_proj"]
    times = -1 / np.asarray(jax.nn.log_sigmoid(gate["bias"]))
    np.testing.assert_allclose(times, [1, 512**0.5, 512], rtol=1e-3)
    np.testing.assert_allclose(
        gate["kernel"], 0.1 * plain["layers"]["2"]["attn"]["fgate_proj"]["kernel"], rtol=1e-6
    )


def test_pruning_is_counted_by_the_tiles_it_leaves() -> None:
    case = Case("tiny", "fox_pro", "tiny", 1, 512, 300)
    cfg, job = benchmark._prepare(case, True, "runtime.log_pruning_tolerance=-1e-9")
    with jax.set_mesh(job.mesh):
        state, _ = start_training(job)
        tokens = benchmark._random_batch(cfg, job)["tokens"][0]
        share = benchmark._visited(cfg, state.params, tokens)
    # Two layers, two heads of decay times 1 and 512: one head keeps the diagonal and what lies next to it.
    assert 0.6 < share < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "3B"}, "part of no case; there are tiny, 2 x 256, ACP off"),
        ({"settings": "runtime.remat"}, "expected KEY=VALUE"),
        ({"settings": "runtime.rematt=none"}, "did you mean 'runtime.remat'"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.rows(cases=(TINY,), **options)


def test_the_real_cases_have_the_configs_of_the_trainer() -> None:
    for case in CASES:
        assert case.goals is not None
        for acp, goal in zip((False, True), case.goals, strict=True):
            cfg, job = benchmark._prepare(case, acp, "")
            assert (cfg.train.batch_size, cfg.train.seq_len, cfg.model.vocab_size) == (
                case.batch,
                16384,
                50304,
            )
            assert (cfg.runtime.log_pruning_tolerance is not None) == acp
            assert cfg.runtime.compute_dtype == "bfloat16"
            assert job.train.accum == 1
            assert goal.official < goal.required < goal.target


def test_a_rate_is_judged_by_its_goal() -> None:
    goal = Goal(1.0, 10.0, 20.0)
    assert [benchmark._met(rate, goal) for rate in (5.0, 10.0, 25.0)] == ["no", "required", "target"]
    assert benchmark._met(5.0, None) == "-"
