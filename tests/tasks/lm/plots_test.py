"""Figures: written whole, of the right data, whatever the data look like."""

import matplotlib.figure
import numpy as np
import pytest

from tasks.lm import plots

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """Every figure saved, still open for inspection."""
    saved = []
    original = matplotlib.figure.Figure.savefig

    def record(self, *args, **kwargs):
        saved.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return saved


def lines(figure, axis=0):
    return {line.get_label(): line.get_xydata() for line in figure.axes[axis].get_lines()}


def test_training_curve_shows_steps_losses_and_evaluations(tmp_path, figures):
    records = [{"kind": "train", "step": s, "loss": 5.0 - s} for s in range(4)]
    records += [{"kind": "speed", "step": 2, "tokens_per_second": 7.0}]
    records += [{"kind": "eval", "step": 2, "validation/loss": 3.5, "validation/perplexity": 33.1}]
    path = tmp_path / "deep" / "loss.png"
    assert plots.plot_training(records, path, "a run")
    assert path.read_bytes().startswith(PNG)
    drawn = lines(figures[0])
    np.testing.assert_array_equal(drawn["training"], [[0, 5], [1, 4], [2, 3], [3, 2]])
    np.testing.assert_array_equal(drawn["validation"], [[2, 3.5]])
    assert len(drawn) == 3  # and the faint unsmoothed one


def test_training_curve_with_nothing_or_broken_values(tmp_path, figures):
    path = tmp_path / "loss.png"
    assert not plots.plot_training([{"kind": "eval", "step": 1, "validation/loss": 2.0}], path)
    assert not path.exists()
    records = [{"kind": "train", "step": s, "loss": v} for s, v in enumerate([3.0, "nan", "inf", 2.0])]
    assert plots.plot_training(records, path)
    records = [{"kind": "train", "step": 0, "loss": "nan"}]
    assert plots.plot_training(records, path)


def losses(*values, tokens=100):
    """Records of a run with these training losses and a held-out loss of the last plus one at its end."""
    records = [
        {"kind": "train", "step": s, "loss": v, "tokens": (s + 1) * tokens} for s, v in enumerate(values)
    ]
    return [*records, {"kind": "eval", "step": len(values), "validation/loss": values[-1] + 1}]


def test_losses_of_several_runs_are_drawn_by_tokens(tmp_path, figures):
    runs = {"a": losses(5.0, 4.0, 3.0), "b": losses(6.0, 2.0, tokens=200), "unborn": []}
    plots.plot_losses(runs, tmp_path / "losses.png", "title")
    training, held_out = lines(figures[0]), lines(figures[0], 1)
    np.testing.assert_array_equal(training["a"], [[100, 5], [200, 4], [300, 3]])
    np.testing.assert_array_equal(training["b"], [[200, 6], [400, 2]])
    np.testing.assert_array_equal(held_out["a"], [[300, 4]])
    np.testing.assert_array_equal(held_out["b"], [[400, 3]])
    assert "unborn" not in training
    with pytest.raises(ValueError, match="no training loss"):
        plots.plot_losses({"unborn": []}, tmp_path / "no.png")


def test_pruning_is_drawn_by_layer_and_head(tmp_path, figures):
    names = [f"pruning/layer_0{layer}/head_0{head}" for layer in (0, 1) for head in (0, 1)]
    rows = {10: [0.0, 0.2, 0.4, 0.6], 20: [0.1, 0.3, 0.9, 0.9]}
    records = [
        {"kind": "eval", "step": s, "pruning/pruned": np.mean(v), **dict(zip(names, v, strict=True))}
        for s, v in rows.items()
    ]
    assert plots.plot_pruning(records, tmp_path / "pruning.png")
    drawn = lines(figures[0])
    np.testing.assert_allclose(drawn["layer 0"], [[10, 0.1], [20, 0.2]])
    np.testing.assert_allclose(drawn["layer 1"], [[10, 0.5], [20, 0.9]])
    np.testing.assert_allclose(drawn["all"], [[10, 0.3], [20, 0.55]])
    image = figures[0].axes[1].get_images()[0].get_array()
    np.testing.assert_allclose(image, np.array(list(rows.values())).T)
    assert not plots.plot_pruning([{"kind": "train", "step": 0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_positions_of_several_runs_with_training_length(tmp_path, figures):
    length = 1024
    mean = np.linspace(4.0, 2.0, length)
    curves = [
        plots.Curve("one", mean, np.full(length, 3), 256),
        plots.Curve("two", mean[:512] + 1, np.full(512, 3), 256),
    ]
    plots.plot_positions(curves, tmp_path / "p.png", window=3, log_x=True)
    left, right = lines(figures[0], 0), lines(figures[0], 1)
    np.testing.assert_allclose(left["one"][0], [128, mean[128]])
    np.testing.assert_allclose(left["two"][-1], [511, mean[510:512].mean() + 1])
    np.testing.assert_allclose(right["one"][0], [1024, np.exp(mean.mean())])
    marks = [line for line in figures[0].axes[0].get_lines() if list(line.get_xdata()) == [256, 256]]
    assert len(marks) == 1
    assert figures[0].axes[0].get_xscale() == "log"


def test_many_curves_are_named_below_and_far_ones_do_not_flatten_the_rest(tmp_path, figures):
    counts = np.ones(64, np.int64)
    curves = [plots.Curve(f"run {i}", np.full(64, 1.0 + i), counts, 32) for i in range(5)]
    plots.plot_positions(curves[:2], tmp_path / "few.png", window=1)
    plots.plot_positions(curves, tmp_path / "many.png", window=1)
    few, many = figures
    assert (len(few.legends), [ax.get_legend() is None for ax in few.axes]) == (0, [False, False])
    assert [t.get_text() for t in many.legends[0].get_texts()] == [f"run {i}" for i in range(5)]
    assert [ax.get_legend() for ax in many.axes] == [None, None]
    assert (few.axes[1].get_yscale(), many.axes[1].get_yscale()) == ("linear", "log")


def test_positions_without_losses_are_refused(tmp_path):
    empty = plots.Curve("none", np.full(4, np.nan), np.zeros(4, np.int64), None)
    for curves in ([], [empty]):
        with pytest.raises(ValueError, match="no position with a loss"):
            plots.plot_positions(curves, tmp_path / "p.png")


def test_unreached_positions_leave_gaps_not_errors(tmp_path):
    mean = np.array([3.0, 2.0, np.nan, np.nan])
    curve = plots.Curve("short", mean, np.array([2, 1, 0, 0]), None)
    plots.plot_positions([curve], tmp_path / "p.png", window=1)
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_heat_map_averages_columns_it_has_no_pixels_for(tmp_path, figures):
    values = np.tile([1.0, 3.0], 1000)[None]
    plots.plot_heat_map(
        values, tmp_path / "h.png", title="t", x_label="x", y_label="y", bar_label="b", x_extent=(0, 2000)
    )
    image = figures[0].axes[0].get_images()[0]
    np.testing.assert_array_equal(image.get_array(), np.full((1, 1000), 2.0))


def test_small_heat_map_carries_its_values(tmp_path, figures):
    values = np.array([[0.25, np.nan], [0.5, 1.0]])
    labels = {"title": "t", "x_label": "x", "y_label": "y", "bar_label": "b"}
    plots.plot_heat_map(values, tmp_path / "h.png", limits=(0.0, 1.0), **labels)
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["0.25", "0.50", "1.00"]


def test_decay_map_is_the_sum_of_log_gates(tmp_path, figures):
    log_fgate = np.array([[-9.0, -0.1], [-1.0, -0.2], [-2.0, -0.4]])
    plots.plot_decay(log_fgate, tmp_path / "d.png", heads=[1, 0], title="t", floor=-2.5)
    first, second = (np.ma.filled(ax.get_images()[0].get_array(), np.nan) for ax in figures[0].axes[:2])
    nan = np.nan
    np.testing.assert_allclose(first, [[0, nan, nan], [-0.2, 0, nan], [-0.6, -0.4, 0]], atol=1e-12)
    np.testing.assert_allclose(second, [[0, nan, nan], [-1, 0, nan], [-2.5, -2, 0]], atol=1e-12)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    records = [{"kind": "train", "step": 0, "loss": 1.0}]
    plots.plot_training(records, path)
    before = path.read_bytes()

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_training(records, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
