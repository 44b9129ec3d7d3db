"""Whole TAPNext trackers, heads and query tokens against the official code, in both numerics.

Every file of the golden folder is read by its own schema: sizes, chunks and options come from the names and
shapes it holds, and each quantity it holds is checked. Weights go through `models.tapnext.convert`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.vit import sincos_positions
from models.tapnext import TAPNextConfig, TAPNextRuntime, apply, convert, heads, init_state, make_queries
from models.tapnext.positions import resample_positions
from models.tapnext.queries import point_tokens

# Golden README: float32 on CPU. Streaming equals the whole clip to 1e-5 there, and the typical error is 1e-5.
LOGITS = {"rtol": 0, "atol": 2e-4}
TRACKS = {"rtol": 0, "atol": 1e-3}
TABLE = {"rtol": 0, "atol": 2e-4}
TOKENS = {"rtol": 0, "atol": 1e-5}
CERTAINTY = {"rtol": 0, "atol": 1e-6}
LOSS = {"rtol": 1e-4, "atol": 0}
GRADIENT = 2e-3  # of the tensor's norm
ZERO_GRADIENT = 1e-6  # of the whole gradient's norm: some are zero in theory (the key's bias)

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
RUNTIME = TAPNextRuntime()
Arrays = dict[str, np.ndarray]
run = jax.jit(apply, static_argnums=(0, 1), static_argnames=("layers",), compiler_options=QUICK_COMPILE)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def below(golden: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def assert_close(actual: Any, expected: np.ndarray, what: str, tolerance: dict[str, float]) -> None:
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    np.testing.assert_allclose(actual, expected, err_msg=what, **tolerance)


class Tracker:
    """One file: config in one of the numerics, parameters, inputs, and what the official code gave."""

    def __init__(self, golden: Arrays, numerics: str):
        height, width, patch_h, patch_w, channels, num_heads, lru_width, depth, mlp = golden[
            "config"
        ].tolist()
        weights = below(golden, "sd/")
        bins = weights["coordinate_head.6.bias"].shape[0] // 2
        self.config = TAPNextConfig(
            image_size=(height, width),
            patch_size=(patch_h, patch_w),
            width=channels,
            depth=depth,
            mlp_size=mlp,
            num_heads=num_heads,
            lru_width=lru_width,
            coordinate_bins=(bins, bins),
            numerics=numerics,
        )
        self.params = convert.from_official(weights, self.config)
        self.golden, self.numerics = golden, numerics
        self.video, self.query_tyx = (jnp.asarray(golden[name]) for name in ("video", "query_points"))
        self.expected = below(golden, f"{numerics}/")

    def ours(self, expected: np.ndarray) -> np.ndarray:
        """PyTorch's outputs are [B, T, Q, .], ours and JAX's [B, Q, T, .]."""
        return np.swapaxes(expected, -3, -2) if self.numerics == "torch" else expected

    def check(self, found: Any, group: str) -> None:
        """Whatever of tracks, logits and state the file has of this group."""
        output, state = found
        for name, actual, tolerance in (
            ("track_logits", output.track_logits, LOGITS),
            ("visible_logits", output.visible_logits[..., None], LOGITS),
            ("tracks", output.tracks_yx, TRACKS),
        ):
            if f"{group}/{name}" in self.expected:
                expected = self.ours(self.expected[f"{group}/{name}"])
                assert_close(actual, expected, f"{group}/{name}", tolerance)
        if state is None or f"{group}/state_rg_lru" not in self.expected:
            return
        layers = [state.layers[str(i)] for i in range(self.config.depth)]
        lru = np.stack([layer.lru for layer in layers])
        conv = np.stack([np.stack(layer.conv, axis=-2) for layer in layers])
        # Rows there are b * N + n; ours are [B, N].
        flat = (len(lru), -1)
        assert_close(
            lru.reshape(*flat, lru.shape[-1]), self.expected[f"{group}/state_rg_lru"], "rg_lru", LOGITS
        )
        conv = conv.reshape(*flat, *conv.shape[-2:])
        assert_close(conv, self.expected[f"{group}/state_conv1d"], "conv1d", LOGITS)
        if f"{group}/step" in self.expected:
            np.testing.assert_array_equal(state.step, self.expected[f"{group}/step"])

    def stream(self, chunks: list[int]) -> tuple[Any, Any]:
        state = init_state(self.config, self.query_tyx)
        outputs, start = [], 0
        for size in chunks:
            frames = self.video[:, start : start + size]
            output, state = run(self.config, RUNTIME, self.params, frames, state=state)
            outputs.append(output._replace(layers=None))
            start += size
        assert start == self.video.shape[1]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *outputs), state


@pytest.fixture(params=["jax", "torch"])
def tracker(golden_file, request) -> Tracker:
    return Tracker(dict(np.load(golden_file)), request.param)


pattern = pytest.mark.golden("tracker_*.npz", room="tapnext")


@pattern
def test_whole_clip_matches_the_official_code(tracker, subtests):
    """The answer, and the read-outs of every layer, which the official code gives for JAX only."""
    output, none = run(tracker.config, RUNTIME, tracker.params, tracker.video, tracker.query_tyx, layers=True)
    assert none is None
    tracker.check((output, None), "full")
    for name, field, tolerance in (
        ("layer_track_logits", "track_logits", LOGITS),
        ("layer_visible_logits", "visible_logits", LOGITS),
        ("layer_tracks", "tracks_yx", TRACKS),
    ):
        if f"full/{name}" in tracker.expected:
            with subtests.test(name):
                found = getattr(output.layers, field)
                found = found[..., None] if field == "visible_logits" else found
                assert_close(found, tracker.expected[f"full/{name}"], name, tolerance)


@pattern
def test_stream_matches_the_official_code(tracker, subtests):
    """Frame by frame, and (PyTorch only) in the file's chunks; also what it gives for the whole clip."""
    frames = tracker.video.shape[1]
    runs = {"stream": [1] * frames}
    if "chunks" in tracker.golden and tracker.numerics == "torch":
        runs["chunked"] = tracker.golden["chunks"].tolist()
    for group, chunks in runs.items():
        with subtests.test(group):
            found = tracker.stream(chunks)
            tracker.check(found, group)
            tracker.check(found, "full")


def check_other_resolution(tracker: Tracker, golden: Arrays) -> None:
    """Positions resampled, queries and tracks in pixels of the native image."""
    video = jnp.asarray(golden["video"])
    grid = tuple(n // p for n, p in zip(video.shape[2:4], tracker.config.patch_size, strict=True))
    table = resample_positions(tracker.params["image"]["positions"], tracker.config.grid, grid)
    assert_close(table[None], golden["torch/image_pos_emb"], "positions", TOKENS)
    tracker.expected = {f"hires/{name}": value for name, value in below(golden, "torch/").items()}
    found = run(tracker.config, RUNTIME, tracker.params, video, jnp.asarray(golden["query_points"]))
    tracker.check(found, "hires")


def official_loss(tracker: Tracker, params: Any) -> dict[str, Any]:
    """0.1 Huber + CE + BCE of the last read-out, weighted and (not CE) masked as PyTorch's reference is."""
    golden = below(tracker.golden, "loss/")
    target, visible = jnp.asarray(golden["target_points_given"])[..., ::-1], jnp.asarray(golden["visible"])
    visible = visible[..., 0]
    output, _ = apply(tracker.config, RUNTIME, params, tracker.video, tracker.query_tyx)
    bins = tracker.config.bins[0]
    error = output.tracks_yx - jnp.clip(target, 0, bins - 1)
    square = jnp.sum(error**2, axis=-1)
    distance = jnp.sqrt(square + 1e-12)
    huber = jnp.where(distance < 1, square / 2, distance - 0.5)
    labels = jnp.round(jnp.clip(target - 0.5, 0, bins - 1)).astype(int)
    logits = jnp.stack(jnp.split(output.track_logits, 2, axis=-1), axis=-2)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    ce = -chosen[..., 0].sum(axis=-1).mean()
    v = output.visible_logits
    losses = {
        "huber": jnp.sum(huber * visible) / jnp.sum(visible),
        "ce": ce,
        "bce": jnp.mean(jax.nn.softplus(v) - v * visible),
    }
    return losses | {"total": 0.1 * losses["huber"] + losses["ce"] + losses["bce"]}


def check_loss_and_gradients(tracker: Tracker) -> None:
    def loss(params: Any) -> Any:
        losses = official_loss(tracker, params)
        return losses["total"], losses

    grads, losses = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)(tracker.params)
    for name, expected in below(tracker.golden, "loss/torch/").items():
        assert_close(losses[name], expected, name, LOSS)
    found = convert.to_official(grads, tracker.config, "torch", buffer=False)
    norms = below(tracker.golden, "gradnorm/")
    assert norms.keys() == found.keys()
    whole = np.sqrt(sum(norm**2 for norm in norms.values()))
    for name, norm in norms.items():
        limit = max(GRADIENT * norm, ZERO_GRADIENT * whole)
        assert abs(np.linalg.norm(found[name]) - norm) <= limit, f"norm of the gradient of {name}"
    for name, gradient in below(tracker.golden, "grad/").items():
        error = np.linalg.norm(found[name] - gradient)
        limit = max(GRADIENT * norms[name], ZERO_GRADIENT * whole)
        assert error <= limit, f"gradient of {name}: off by {error:.3g}, allowed {limit:.3g}"


@pattern
def test_loss_gradients_and_resolution_match_the_official_code(golden_file, subtests):
    """What was computed with the PyTorch code only."""
    golden = dict(np.load(golden_file))
    parts = {"loss and gradients": check_loss_and_gradients} if "loss/torch/total" in golden else {}
    if "hires/video" in golden:
        parts["other resolution"] = lambda tracker: check_other_resolution(tracker, below(golden, "hires/"))
    assert parts, "the file has neither"
    for name, check in parts.items():
        with subtests.test(name):
            check(Tracker(golden, "torch"))


@pattern
def test_checkpoint_survives_the_round_trip(golden_file):
    """PyTorch's names to ours, to the .npz's (as the official converter does it) and back, bit for bit."""
    golden = dict(np.load(golden_file))
    weights, npz = below(golden, "sd/"), below(golden, "npz/")
    config = Tracker(golden, "torch").config
    assert convert.config_from_official(weights, config.grid, image_size=config.image_size) == config
    params = convert.from_official(weights)
    for layout, expected in (("torch", weights), ("npz", npz)):
        found = convert.to_official(params, config, layout, buffer=False)
        if expected:
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)
    other = convert.from_official(convert.to_official(params, config), config)
    jax.tree.map(np.testing.assert_array_equal, other, params)


def head_config(golden: Arrays, numerics: str = "jax") -> TAPNextConfig:
    bins = golden["track_logits"].shape[-1] // 2
    return TAPNextConfig(coordinate_bins=(bins, bins), numerics=numerics)


@pytest.mark.golden("heads*.npz", room="tapnext")
def test_decoding_and_its_gradient_match_the_official_code(golden_file):
    golden = dict(np.load(golden_file))
    config, logits = head_config(golden), jnp.asarray(golden["track_logits"])
    tracks, pull = jax.vjp(lambda logits: heads.decode_tracks(config, logits), logits)
    for name in ("tracks_jax", "tracks_torch"):
        if name in golden:
            assert_close(tracks, golden[name], name, TRACKS)
    (gradient,) = pull(jnp.asarray(golden["grad_w"]))
    error = np.linalg.norm(gradient - golden["grad_track_logits"])
    assert error <= GRADIENT * np.linalg.norm(golden["grad_track_logits"])


@pytest.mark.golden("heads*.npz", room="tapnext")
def test_certainty_matches_the_official_code_where_that_is_right(golden_file):
    """JAX: unless a coordinate exceeds the last bin less the radius; PyTorch: away from all borders."""
    golden = dict(np.load(golden_file))
    config, logits = head_config(golden), jnp.asarray(golden["track_logits"])
    tracks, last = golden["tracks_torch"], config.bins[0] - 1
    checked = 0
    for name in [name for name in golden if name.startswith("certainty_")]:
        radius = int(name.rpartition("_r")[2])
        found = np.asarray(heads.certainty(config, logits, jnp.asarray(tracks), radius))
        right = (tracks <= last - radius).all(axis=-1)
        if "torch" in name:
            right &= (tracks >= radius + 1).all(axis=-1)
        assert right.any()
        tolerance = {"rtol": 0, "atol": 5e-4} if "torch" in name else CERTAINTY
        assert_close(found[right], golden[name][..., 0][right], name, tolerance)
        if f"visible_certain_{name.removeprefix('certainty_')}" in golden:
            gated = heads.is_visible(jnp.asarray(golden["visible_logits"][..., 0]), jnp.asarray(found))
            expected = golden[f"visible_certain_{name.removeprefix('certainty_')}"][..., 0]
            np.testing.assert_array_equal(np.asarray(gated)[right], expected[right])
        checked += 1
    assert checked


@pytest.mark.golden("query_embed*.npz", room="tapnext")
@pytest.mark.parametrize("numerics", ["jax", "torch"])
def test_query_tokens_match_the_official_code(golden_file, numerics, subtests):
    golden = dict(np.load(golden_file))
    height, width, channels, frames = golden["config"].tolist()
    config = TAPNextConfig(
        image_size=(height, width), patch_size=(1, 1), width=channels, num_heads=1, numerics=numerics
    )
    params = {
        name: jnp.asarray(golden[official].reshape(-1))
        for name, official in (
            ("query", "point_query_token"),
            ("mask", "mask_token"),
            ("unknown", "unknown_token"),
        )
    }
    tokens_of = jax.jit(point_tokens, static_argnums=0, compiler_options=QUICK_COMPILE)
    table = np.asarray(sincos_positions((height, width), channels)).reshape(height, width, channels)
    assert_close(table, golden[f"posemb_sincos2d_{numerics}"], "table", TABLE)

    def tokens(points: np.ndarray, frames: int, valid: np.ndarray | None = None) -> Any:
        queries = make_queries(jnp.asarray(points), None if valid is None else jnp.asarray(valid > 0))
        positions = jnp.tile(jnp.arange(frames), (len(points), 1))
        return tokens_of(config, params, queries, positions)

    for suffix, count in (("", frames), ("_T1", 1)):
        with subtests.test(f"tokens{suffix}"):
            expected = golden[f"tokens_{numerics}{suffix}"]
            assert_close(tokens(golden["query_points"], count), expected, suffix, TOKENS)
    if numerics == "torch":
        return
    with subtests.test("several hints per track"):
        found = tokens(golden["hints_query_points"], frames, golden["hints_query_padding"])
        assert_close(found, golden["hints_tokens_jax"], "hints", TOKENS)
    with subtests.test("fractional times"):
        found = tokens(golden["frac_t_query_points"], frames)
        assert_close(found, golden["frac_t_tokens_jax"], "fractional", TOKENS)
