"""A TAPNext behind the evaluation's call: one pass, the reversed pass, padding, scale, certainty."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tapnext
from models.common.params import ONES, unflatten_names
from tasks.points import eval as evaluation
from tasks.points.data.sets import open_set
from tasks.points.evaluators import queries_of
from tasks.points.metrics import METRICS, tapvid_metrics
from tasks.points.model_predictor import ModelPredictor
from tasks.points.resize import resize_video
from tests.tasks.points.annotated_videos import annotated, write_davis

CONFIG = tapnext.TAPNextConfig(
    image_size=(16, 16), patch_size=(8, 8), width=16, depth=1, mlp_size=64, num_heads=2, head_width=256
)
RUNTIME = tapnext.TAPNextRuntime()
QUERY = np.array([[0.0, 2.0, 3.0], [3.0, 9.5, 14.0], [6.0, 5.0, -0.25]])  # the last is just outside
FRAMES = 7
TRACKS, LOGITS = 1e-3, 2e-4  # the golden tolerances; random weights have no near ties here


@pytest.fixture(scope="module")
def params(video):
    """Random, none constant; drawn by NumPy, since compiling `init_params` takes longer."""
    draw = np.random.default_rng(0)

    def value(name, spec):
        noise = draw.normal(size=spec.shape)
        if name.endswith("a_param"):
            return jnp.asarray(noise - 1, jnp.float32)
        scale = 2 * spec.shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        return jnp.asarray(scale * noise + (spec.init == ONES), jnp.float32)

    params = unflatten_names({name: value(name, spec) for name, spec in tapnext.param_specs(CONFIG).items()})
    logits = whole(params, video, jnp.asarray(QUERY, jnp.float32)).visible_logits
    params["visible_head"]["out"]["bias"] -= jnp.median(logits)  # some points are visible, some are not
    return params


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (FRAMES, 16, 16, 3), dtype=np.uint8)


@jax.jit
def whole(params, video, query_tyx):
    output, _ = tapnext.apply(CONFIG, RUNTIME, params, video[None], query_tyx[None])
    return output


def test_it_is_the_model_and_its_reversed_pass(params, video):
    """Chunks of 3 frames and rows that fill up change nothing."""
    found = ModelPredictor(CONFIG, RUNTIME, params, chunk=3)(video, QUERY)
    forward = whole(params, video, jnp.asarray(QUERY, jnp.float32))
    turned = np.stack([FRAMES - 1 - QUERY[:, 0], *QUERY[:, 1:].T], axis=-1)
    reverse = whole(params, video[::-1], jnp.asarray(turned, jnp.float32))
    before = np.arange(FRAMES) < QUERY[:, :1]
    tracks = np.where(before[..., None], reverse.tracks_yx[0, :, ::-1], forward.tracks_yx[0])
    logits = np.where(before, reverse.visible_logits[0, :, ::-1], forward.visible_logits[0])
    np.testing.assert_allclose(found.tracks_yx, tracks, atol=TRACKS)
    clear = np.abs(logits) > LOGITS
    np.testing.assert_array_equal(found.visible[clear], logits[clear] > 0)
    assert 0 < found.visible.mean() < 1


def test_forward_only(params, video):
    found = ModelPredictor(CONFIG, RUNTIME, params, backward=False)(video, QUERY)
    both = ModelPredictor(CONFIG, RUNTIME, params)(video, QUERY)
    after = np.arange(FRAMES) >= QUERY[:, :1]
    np.testing.assert_allclose(found.tracks_yx[after], both.tracks_yx[after], atol=TRACKS)
    assert not found.visible[~after].any()
    assert (found.tracks_yx[1, :3] == QUERY[1, 1:]).all()


def test_a_larger_video_gives_tracks_in_its_pixels(params, video):
    """At twice the size queries are halved for the model, and its tracks doubled."""
    large = np.repeat(np.repeat(video, 2, axis=1), 2, axis=2)
    found = ModelPredictor(CONFIG, RUNTIME, params, backward=False)(large, QUERY * [1, 2, 2])
    native = whole(params, large, jnp.asarray(QUERY, jnp.float32))
    after = np.arange(FRAMES) >= QUERY[:, :1]
    np.testing.assert_allclose(
        found.tracks_yx[after], 2 * np.asarray(native.tracks_yx[0])[after], atol=2 * TRACKS
    )


def test_certainty_gates_visibility(params, video):
    plain = ModelPredictor(CONFIG, RUNTIME, params, backward=False)(video, QUERY)
    gated = ModelPredictor(CONFIG, RUNTIME, params, backward=False, certainty_radius=2.0)(video, QUERY)
    np.testing.assert_array_equal(gated.tracks_yx, plain.tracks_yx)
    assert gated.visible.sum() < plain.visible.sum()
    assert not (gated.visible & ~plain.visible).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk": 0}, "chunk = 0: must be at least 1"), ({"certainty_radius": 0.0}, "certainty_radius = 0")],
)
def test_bad_options_are_refused(params, options, message):
    with pytest.raises(ValueError, match=message):
        ModelPredictor(CONFIG, RUNTIME, params, **options)


def test_the_command_evaluates_an_official_file(tmp_path, params, monkeypatch):
    """Weights, file and pickle as released; metrics computed here from the model's own answer."""
    clip = annotated(3, frames=FRAMES)
    data, weights = write_davis(tmp_path / "x.pkl", [clip]), tmp_path / "weights.npz"
    tapnext.convert.save_official(weights, params, CONFIG)
    words = [
        "--dataset=davis",
        f"--data_path={data}",
        f"--checkpoint={weights}",
        f"--output={tmp_path / 'out'}",
    ]
    evaluation.main([*words, "--size=16"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["model"]["image_size"] == [16, 16]
    queries = queries_of(open_set("davis", data).videos[0], "first")
    output = whole(
        params, resize_video(clip.video, 16, 16), jnp.asarray(queries.query_tyx / [1, 16, 16], jnp.float32)
    )
    tracks_xy = np.asarray(output.tracks_yx)[..., ::-1] * 16
    occluded = np.asarray(output.visible_logits) <= 0
    expected = tapvid_metrics(
        queries.query_tyx[None], queries.occluded[None], queries.tracks_xy[None], occluded, tracks_xy, "first"
    )
    for name in METRICS:
        assert summary["means"][name] == pytest.approx(float(expected[name][0]), abs=1e-9), name
    with pytest.raises(ValueError, match="--size=20: must be a multiple of the model's patch size"):
        evaluation.main([*words, "--size=20"])
