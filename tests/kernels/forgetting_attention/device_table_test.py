"""The device table on sizes a CPU does in seconds: what the numbers say, not how large they are."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.bench import Rates
from kernels.forgetting_attention import device_table
from kernels.forgetting_attention.benchmark import verdict
from kernels.forgetting_attention.config import TileConfig
from kernels.forgetting_attention.device_table import CASES, GOALS, SHAPES, Goal, Inputs, Shape
from kernels.forgetting_attention.pruning import acp_threshold, visited_fraction
from kernels.forgetting_attention.visits import forward_visits, measure_visits
from kernels.forgetting_attention.workloads import gates

SMALL = Shape(1, 384, 2, 16)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return device_table.rows(
        bursts=1, shapes=(SMALL,), implementation="xla_chunked", baseline="xla", slow="reference"
    )


@pytest.mark.slow
def test_every_case_and_pass_has_a_row_of_the_same_keys(rows: list[dict]) -> None:
    ours = [row for row in rows if row["implementation"] == "xla_chunked"]
    # The overhead of finding bounds is one row more.
    assert len(ours) == sum(len(passes) for *_, passes in CASES) + 1
    assert {row["implementation"] for row in rows} == {"xla_chunked", "reference"}
    assert len({tuple(row) for row in rows}) == 1
    assert {"case", "pass", "ms", "baseline", "baseline_ms", "ratio", "measured"} <= rows[0].keys()


@pytest.mark.slow
def test_backward_is_the_difference_and_ratios_are_quotients(rows: list[dict]) -> None:
    exact = {
        row["pass"]: row
        for row in rows
        if "global, exact" in row["case"] and row["implementation"] != "reference"
    }
    for key in ("ms", "baseline_ms"):
        assert exact["bwd"][key] == pytest.approx(exact["fwd+bwd"][key] - exact["fwd"][key], abs=2e-3)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / row["baseline_ms"], rel=0.02, abs=2e-3)
        assert row["FLOP floor ms"] > 0
        assert row["met"] == "-"  # the goals are those of other shapes


@pytest.mark.slow
def test_overhead_is_measured_against_our_own_exact_forward(rows: list[dict]) -> None:
    overhead = [row for row in rows if row["baseline"] == "xla_chunked, exact"]
    exact = next(row for row in rows if "global, exact" in row["case"] and row["pass"] == "fwd")
    assert [row["baseline_ms"] for row in overhead] == [exact["ms"]]


def test_floors_count_the_causal_half_and_every_array_once() -> None:
    shape = Shape(2, 16384, 16, 64)
    assert shape.flops["fwd"] == pytest.approx(2 * 16 * 16384**2 * 64 * 2, rel=1e-4)
    assert shape.flops["bwd"] == pytest.approx(2.5 * shape.flops["fwd"])
    assert shape.bytes["fwd"] == 4 * 2 * 2 * 16384 * 16 * 64 + 2 * 4 * 2 * 16384 * 16


def test_goals_name_cases_that_are_timed() -> None:
    timed = {(kind, rule, one) for kind, rule, passes in CASES for one in passes}
    for shape, *case in GOALS:
        assert shape in SHAPES
        assert tuple(case) in timed
    for goal in GOALS.values():
        assert goal.official > goal.required > goal.target


def test_the_threshold_is_the_published_one() -> None:
    inputs = Inputs.draw(SMALL, 0)
    published = acp_threshold(inputs.q, inputs.k, sm_scale=16**-0.5, num_keys=384)
    assert SMALL.threshold == pytest.approx(float(published.mean()), rel=0.01)


def test_a_row_is_judged_by_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {0.9: "target", 1.05: "required", 1.2: "no"}
    assert {ratio: device_table._met(ratio, Goal(2.0, 1.1, 1.0)) for ratio in ratios} == ratios
    judged = [{"case": "a", "pass": "fwd", "ratio": r, "required": 1.1, "met": m} for r, m in ratios.items()]
    assert verdict(judged).startswith("required: 2 of 3 hold; target: 1 of 3")
    assert "not met: a fwd (1.2 > 1.1)" in verdict(judged)
    assert verdict([{"met": "-"}]) == ""


def test_unknown_shape_and_unusable_results_are_named() -> None:
    with pytest.raises(ValueError, match=r"H77.*B1 T384"):
        device_table.rows(shapes=(SMALL,), only="H77")
    with pytest.raises(FloatingPointError, match="this case"):
        device_table._require_finite((jnp.ones(2), jnp.array([1, jnp.nan])), "this case")


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(128, 128), (64, 128), (128, 64)])
def test_visited_tiles_of_the_threshold_are_those_of_the_pruning_module(tile: tuple[int, int]) -> None:
    inputs = Inputs.draw(SMALL, 0)
    log_fgate = jnp.asarray(gates("mix", np.random.default_rng(0), (1, 384, 2)), jnp.float32)
    visits = measure_visits(
        inputs.q, inputs.k, log_fgate, tiles=TileConfig(tile, tile, tile), adaptive_threshold=-20.0
    )
    expected = float(visited_fraction(log_fgate, jnp.full((1, 2), -20.0), tile=tile).mean())
    assert visits.forward == pytest.approx(expected)
    # One rule, one set of tiles, whichever pass walks it.
    assert visits.backward_kv == pytest.approx(expected)
    assert visits.backward_q == pytest.approx(expected)
    assert 0 < visits.both < 1


def test_the_tight_rule_visits_fewer_tiles_and_no_rule_visits_all() -> None:
    inputs = Inputs.draw(SMALL, 0)
    log_fgate = jnp.asarray(4 * gates("fast", np.random.default_rng(0), (1, 384, 2)), jnp.float32)
    tiles = TileConfig((16, 16), (16, 16), (16, 16))
    shares = {
        rule: measure_visits(inputs.q, inputs.k, log_fgate, tiles=tiles, adaptive_threshold=rule).both
        for rule in (None, "auto", "tight")
    }
    assert shares[None] == 1
    assert shares["tight"] < shares["auto"] < 1


@pytest.mark.slow
def test_forward_visits_by_head_are_those_of_the_table_and_leave_padding_out() -> None:
    inputs = Inputs.draw(SMALL, 0)
    log_fgate = jnp.asarray(4 * gates("mix", np.random.default_rng(0), (1, 384, 2)), jnp.float32)
    tile = (32, 16)
    tiles = TileConfig(tile, tile, tile)
    for rule in ("auto", "tight"):
        shares = forward_visits(inputs.q, inputs.k, log_fgate, tile=tile, adaptive_threshold=rule)
        whole = measure_visits(inputs.q, inputs.k, log_fgate, tiles=tiles, adaptive_threshold=rule)
        assert float(shares.mean()) == pytest.approx(whole.forward)
        assert float(shares[0, 0]) < float(shares[0, 1]), "the first head forgets faster"
        # 192 pads are whole tiles: what is left is the second half's own call, counted by itself.
        padded = forward_visits(
            inputs.q, inputs.k, log_fgate, tile=tile, adaptive_threshold=rule,
            log_pruning_tolerance=-10.0 + np.log(384 / 192), seq_start=jnp.array([192]),
        )  # fmt: skip
        alone = forward_visits(
            inputs.q[:, 192:], inputs.k[:, 192:], log_fgate[:, 192:], tile=tile, adaptive_threshold=rule
        )
        np.testing.assert_allclose(padded, alone, rtol=1e-6)


def test_rates_say_that_they_were_measured() -> None:
    assert str(Rates(7.9e14, 4.3e12)) == "matmul 790 TFLOP/s, copy 4.30 TB/s, measured in this run"
