"""TAP-Vid's metrics, query sampling and resize, AJ_RD and the losses against the official code.

Cases, sizes and options are read from the names in each file.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.points import losses
from tasks.points.metrics import tapvid_metrics
from tasks.points.queries import sample_first, sample_strided
from tasks.points.reappearance import aj_rd, reappearances
from tasks.points.resize import resize_video

Arrays = dict[str, np.ndarray]
METRIC_RTOL = 1e-12
AJ_RD_RTOL = 1e-6
LOSS = {"rtol": 1e-5, "atol": 1e-7}
RESIZE_LEVELS = 2  # grey levels, where the resampler is another build of Pillow


def cases(golden: Arrays) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for name, value in golden.items():
        case, _, rest = name.partition("/")
        found.setdefault(case, {})[rest] = value
    assert found
    return found


@pytest.mark.golden("tapvid_metrics*.npz", room="tapnext")
def test_tapvid_metrics(golden_file, subtests):
    for name, case in cases(dict(np.load(golden_file))).items():
        inputs = [
            case[key] for key in ("query_points", "gt_occluded", "gt_tracks", "pred_occluded", "pred_tracks")
        ]
        for kind in sorted({key.rpartition("/")[0] for key in case if "/" in key}):
            with subtests.test(f"{name}/{kind}"):
                mode, scope = kind.split("/")
                found = tapvid_metrics(*inputs, mode, per_track=scope == "track")
                expected = {k.rpartition("/")[2]: v for k, v in case.items() if k.startswith(f"{kind}/")}
                assert found.keys() == expected.keys()
                for metric, value in expected.items():
                    assert found[metric].dtype == np.float64
                    np.testing.assert_allclose(found[metric], value, rtol=METRIC_RTOL, err_msg=metric)


@pytest.mark.golden("query_sampling*.npz", room="tapnext")
def test_query_sampling(golden_file, subtests):
    for name, case in cases(dict(np.load(golden_file))).items():
        for kind in sorted({key.partition("/")[0] for key in case if "/" in key}):
            stride = int(kind.removeprefix("strided") or 5) if kind != "first" else 0
            with subtests.test(f"{name}/{kind}"):
                args = case["target_occluded"], case["target_points"]
                found = sample_strided(*args, stride) if stride else sample_first(*args)
                assert found.query_tyx.dtype == np.float64
                np.testing.assert_array_equal(found.query_tyx, case[f"{kind}/query_points"][0])
                np.testing.assert_array_equal(found.tracks_xy, case[f"{kind}/target_points"][0])
                np.testing.assert_array_equal(found.occluded, case[f"{kind}/occluded"][0])
                if stride:
                    np.testing.assert_array_equal(found.track, case[f"{kind}/trackgroup"][0])


@pytest.mark.golden("aj_rd*.npz", room="tapnext")
def test_aj_rd(golden_file, subtests):
    for name, case in cases(dict(np.load(golden_file))).items():
        with subtests.test(name):
            keys = ("gt_tracks", "gt_visible", "pred_tracks", "pred_visible")
            events = reappearances(*(case[key] for key in keys))
            if "events_b_t_n" in case:
                order = np.lexsort(case["events_b_t_n"].T[::-1])
                np.testing.assert_array_equal(events.where, case["events_b_t_n"][order])
                np.testing.assert_array_equal(events.durations, case["durations"][order])
            found, checked = aj_rd(events), 0
            for key, value in case.items():
                if match := re.fullmatch(r"AJ_RD(?:_D(\d+))?(?:_dmin(\d+))?", key):
                    threshold, shortest = match.groups()
                    ours = "aj_rd" + (f"_{threshold}" if threshold else "")
                    ours += f"_min{shortest}" if shortest else ""
                    np.testing.assert_allclose(found[ours], value, rtol=AJ_RD_RTOL, err_msg=key)
                    checked += 1
            assert checked


@pytest.mark.golden("resize*.npz", room="tapnext")
def test_evaluation_resize(golden_file, subtests):
    for name, case in cases(dict(np.load(golden_file))).items():
        with subtests.test(name):
            expected = case["resized"]
            found = resize_video(case["video"], *expected.shape[1:3])
            assert found.dtype == np.uint8
            difference = np.abs(found.astype(int) - expected.astype(int))
            assert difference.max() <= RESIZE_LEVELS


def loss_values(golden: Arrays, prefix: str = "") -> dict[str, tuple]:
    """name -> (values by the argument that has gradients, that argument)."""
    bins = (golden["track_logits"].shape[-1] // 2,) * 2
    target, visible = jnp.asarray(golden["target_points"]), golden["visible"][..., 0] > 0
    tracks, logits = jnp.asarray(golden["pred_points"]), jnp.asarray(golden["visible_logits"][..., 0])
    return {
        "huber": (lambda x: losses.huber(x, target, bins), tracks),
        "ce": (
            lambda x: losses.coordinate_cross_entropy(x, target, bins),
            jnp.asarray(golden["track_logits"]),
        ),
        "bce": (lambda x: losses.visibility_cross_entropy(x, jnp.asarray(visible)), logits),
        "certainty": (lambda x: losses.certainty_cross_entropy(x, tracks, target), logits),
    }


@pytest.mark.golden("losses*.npz", room="tapnext")
def test_losses_and_their_gradients(golden_file, subtests):
    golden = dict(np.load(golden_file))
    mask = jnp.asarray(golden["visible"][..., 0])
    for name, (values_of, argument) in loss_values(golden).items():
        official = {k.split("/")[2]: v for k, v in golden.items() if k.startswith(f"jax/{name}/")}
        if not official:
            continue
        with subtests.test(name):
            values = values_of(argument)
            np.testing.assert_allclose(values, official["values"][..., 0], **LOSS)
            kinds = {
                "mask": (mask, "mask"),
                "nomask": (None, "mask"),
                "values": (mask, "values"),
            }
            for kind, (weights, normalize) in kinds.items():
                mean = losses.masked_mean(values, weights, normalize)
                np.testing.assert_allclose(mean, official[f"mean_{kind}"], err_msg=kind, **LOSS)
            for kind in ("mask", "nomask"):
                if f"grad_{kind}" in official:
                    weights = mask if kind == "mask" else None
                    gradient = jax.grad(lambda x, f=values_of, w=weights: losses.masked_mean(f(x), w))(
                        argument
                    )
                    expected = official[f"grad_{kind}"].reshape(gradient.shape)
                    np.testing.assert_allclose(gradient, expected, err_msg=f"gradient, {kind}", **LOSS)


@pytest.mark.golden("losses*.npz", room="tapnext")
def test_the_official_total(golden_file):
    """0.1 Huber + cross-entropy + visibility, of one read-out; its cross-entropy ignores the mask."""
    golden = dict(np.load(golden_file))
    mask = jnp.asarray(golden["visible"][..., 0])
    found = {}
    for name, (values_of, argument) in loss_values(golden).items():
        if f"torch/{name}/value" in golden:
            weights = mask if name == "huber" else None
            value, gradient = jax.value_and_grad(
                lambda x, f=values_of, w=weights: losses.masked_mean(f(x), w)
            )(argument)
            np.testing.assert_allclose(value, golden[f"torch/{name}/value"], err_msg=name, **LOSS)
            expected = golden[f"torch/{name}/grad"].reshape(gradient.shape)
            np.testing.assert_allclose(gradient, expected, err_msg=name, **LOSS)
            found[name] = value
    config = losses.PointLossConfig()
    total = config.huber * found["huber"] + config.coordinate * found["ce"] + config.visibility * found["bce"]
    np.testing.assert_allclose(total, golden["torch/total"], **LOSS)
