"""The float64 reference of long contexts is right, and an error that grows is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import accuracy, forgetting_attention
from kernels.forgetting_attention.accuracy import KINDS, TENSORS, Results
from kernels.forgetting_attention.device_table import Shape


@pytest.mark.slow
@pytest.mark.parametrize("scores", [2**27, 2**10], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("length", [96, 97])
def test_blocks_of_rows_give_what_the_definition_gives(
    length: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "_SCORES", scores)
    accuracy._exact.clear_cache()
    rng = np.random.default_rng(length)
    q, k, v, cotangent = (rng.standard_normal((length, 16)).astype(np.float32) for _ in range(4))
    log_fgate = np.asarray(accuracy.draw_gates("mix", length, 1, 0))[0, :, 0] / 30
    found = accuracy.exact_results(*map(jnp.asarray, (q, k, v, log_fgate, cotangent)))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64)[None, :, None] for x in (q, k, v)]

        def attend(*args):
            return forgetting_attention(*args, implementation="reference")

        gates = jnp.asarray(log_fgate, jnp.float64)[None, :, None]
        out, pullback = jax.vjp(attend, *wide, gates)
        grads = pullback(jnp.asarray(cotangent, jnp.float64)[None, :, None])
        for name, ours, theirs in zip(Results._fields, found, (out, *grads), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs[0, :, 0], atol=1e-12, err_msg=name)


def test_errors_are_relative_to_each_row_and_to_all_gates() -> None:
    exact = Results(*(jnp.asarray([[3.0, 4.0], [0.3, 0.4]]) for _ in range(4)), jnp.asarray([3.0, 4.0]))
    wrong = Results(*(x * 1.25 for x in exact))
    np.testing.assert_allclose(accuracy.relative_squares(wrong, exact), 0.25**2, rtol=1e-6)
    one_row = exact._replace(dq=exact.dq + jnp.asarray([[0.0, 0.0], [0.0, 0.25]]))
    assert accuracy.relative_squares(one_row, exact)[1] == pytest.approx(0.5**2 / 2)
    # A row that is almost 0 counts as a hundredth of the root mean square length.
    tiny = exact._replace(dq=exact.dq.at[1].set(0.0))
    off = tiny._replace(dq=tiny.dq.at[1, 0].set(1e-3))
    assert accuracy.relative_squares(off, tiny)[1] == pytest.approx((1e-3 / (0.01 * 12.5**0.5)) ** 2 / 2)


@pytest.mark.slow
def test_all_kinds_are_measured_at_all_lengths_and_judged() -> None:
    rows = accuracy.rows(lengths=(64, 128), heads=2, head_dim=16)
    assert [row["case"].split(" H16 ")[1] for row in rows[::2]] == list(KINDS) * 2
    for row in rows:
        assert 0 < row["out"] < 0.01
        assert row["met"] == (
            "-" if row["case"].startswith("T64 ") else "yes" if row["times"] <= 1.5 else "no"
        )
    assert "of 8" in accuracy.verdict(rows)


@pytest.mark.slow
def test_an_error_that_grows_with_the_context_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(shape: Shape, acp: bool, implementation: str | None):
        def noisy(q, k, v, cotangent, log_fgate):
            heads = range(shape.heads)
            exact = [
                accuracy.exact_results(*(x[0, :, h] for x in (q, k, v, log_fgate, cotangent))) for h in heads
            ]
            found = Results(
                *(
                    jnp.stack([jnp.asarray(y, jnp.float32) for y in x], 1)[None]
                    for x in zip(*exact, strict=True)
                )
            )
            share = 1e-3 * shape.length / 64 if acp else 1e-3
            return found._replace(dv=found.dv * (1 + share))

        return noisy

    monkeypatch.setattr(accuracy, "_run", run)
    rows = accuracy.rows(lengths=(64, 128), heads=2, head_dim=16, only="fast")
    assert {row["case"].split(" ", 3)[3] for row in rows if row["case"].startswith("T128")} == {
        "fast", "fast, ACP", "uniformly fast", "uniformly fast, ACP"
    }  # fmt: skip
    lines = accuracy.verdict(rows).splitlines()
    assert lines[0].endswith("2 of 4")
    assert all("ACP: 2" in line or "ACP: 1.99" in line for line in lines[1:])
    assert len(TENSORS) == len(Results._fields)


@pytest.mark.slow
def test_a_part_of_no_case_is_named() -> None:
    with pytest.raises(ValueError, match="only='mixx' is part of no case"):
        accuracy.rows(lengths=(64,), heads=2, head_dim=16, only="mixx")


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_log_gates(kind: str) -> None:
    drawn = np.asarray(accuracy.draw_gates(kind, 256, 4, 0))
    assert drawn.shape == (1, 256, 4)
    assert (drawn <= 0).all()
    if kind == "uniformly fast":
        assert drawn.mean() == pytest.approx(-5, abs=0.2)
