"""TAPNext (arXiv 2504.05579): image and point tokens, layers of recurrence over time and attention over the
frame, tracks read off the points' tokens.

`apply` is the model. `TAPNext` wraps it as an NNX module for those who want to hold parameters in an object.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Num

from kernels.linear_scan import RESIDUAL_NAMES
from models.common.joined import expected_shapes
from models.common.layers import linear
from models.common.module import ModelModule
from models.common.params import check_params, layer_keys
from models.common.recurrent_state import RecurrentState
from models.common.rglru import frame_positions, residual_block
from models.common.shapes import Params
from models.common.sharding import constrain, gathered
from models.common.stack import read_layers
from models.common.vit import grid_of, patchify, vit_block
from models.tapnext.config import TAPNextConfig, TAPNextRuntime
from models.tapnext.heads import Readout, read_out
from models.tapnext.parameters import init_params, param_specs
from models.tapnext.positions import resample_positions
from models.tapnext.queries import Queries, make_queries, point_tokens
from models.tapnext.state import TAPNextState

Video = Num[Array, "B T height width 3"]
LayerStates = dict[str, RecurrentState]
TokenMask = Bool[Array, "B T #P P"]


class TAPNextOutput(NamedTuple):
    """The model's answer, float32, and on request those of its layers.

    Attributes:
      tracks_yx: [B, Q, T, 2], (y, x) in pixels of the native image.
      track_logits: [B, Q, T, bins], of the bins along y, then along x.
      visible_logits: [B, Q, T], of the point being visible; above 0 it is.
      layers: the read-outs after every layer, each field with a leading axis [L]; None unless asked for.
    """

    tracks_yx: Float[Array, "B Q T 2"]
    track_logits: Float[Array, "B Q T bins"]
    visible_logits: Float[Array, "B Q T"]
    layers: Readout | None = None


class PointFeatures(NamedTuple):
    """The points' tokens, in the residual dtype, without the final norm.

    Attributes:
      last: [B, Q, T, D], after the last layer.
      layers: [L, B, Q, T, D], after every layer; None unless asked for.
    """

    last: Float[Array, "B Q T D"]
    layers: Float[Array, "L B Q T D"] | None


def image_tokens(
    config: TAPNextConfig, runtime: TAPNextRuntime, params: Params, video: Video
) -> Float[Array, "B T P D"]:
    """Patches times a matrix, plus the position of each, the same in every frame.

    Args:
      params: "patch" and "positions", the latter resampled for frames of another size than the native one.
      video: pixels in [-1, 1], or uint8.
    """
    pixels = video.astype(jnp.float32) / 127.5 - 1 if video.dtype == jnp.uint8 else video
    # Pixels are cast before they are cut up: a patch row is as large as the frame.
    patches = patchify(pixels.astype(runtime.compute_dtype), config.patch_size)
    tokens = linear(patches, params["patch"], runtime.compute_dtype)
    grid = grid_of((video.shape[2], video.shape[3]), config.patch_size)
    positions = resample_positions(gathered(params["positions"]), config.grid, grid)
    return (tokens + positions).astype(runtime.residual_dtype)


def block(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    params: Params,
    x: Float[Array, "B T P D"],
    positions: Int[Array, "B T"],
    mask: TokenMask | None = None,
    state: RecurrentState | None = None,
    asked: int | None = None,
) -> tuple[Float[Array, "B T asked D"], RecurrentState]:
    """One layer: the recurrent block along every token's time, then the ViT block in every frame (sheet 1.4).

    Args:
      params: the layer's group.
      positions: frames since the start of the clip.
      mask: which tokens each token attends to; None: all of the frame.
      state: the layer's memory of earlier calls.
      asked: how many of the tokens, the last ones, are returned; None: all.

    Returns:
      (tokens in x's dtype, the layer's memory after the call).
    """
    dtype = runtime.compute_dtype
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # see models.trecvit.model.block
    x, state = residual_block(
        x, params, positions, state, dtype, runtime.scan_implementation, runtime.gated_mlp
    )
    x = vit_block(
        x,
        params,
        config.num_heads,
        dtype,
        runtime.attention_implementation,
        mask=mask,
        approximate=config.approximate_gelu,
        asked=asked,
    )
    return x, state


def encode(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    params: Params,
    x: Float[Array, "B T P D"],
    positions: Int[Array, "B T"],
    tracks: int,
    mask: TokenMask | None = None,
    states: LayerStates | None = None,
    layers: bool = False,
) -> tuple[PointFeatures, LayerStates | None]:
    """All layers. Of the last one only the points are computed where it ends: nothing reads the image there.

    Args:
      params: the layers' groups by name.
      x: image tokens, then those of the points.
      tracks: Q, how many of the tokens are points.
      states: memory of the layers by name; None = whole clips, and none is returned.
      layers: keep the points' tokens after every layer too.
    """

    def points(x: Array) -> Array:
        return jnp.swapaxes(x[..., x.shape[-2] - tracks :, :], -3, -2)

    def read(x: Array) -> Array | None:
        return points(x) if layers else None

    *names, last = layer_keys(params)
    if states is None:

        def run(names: list[str], x: Array, scan: bool, asked: int | None) -> tuple[Array, Array | None]:
            def layer(params: Params, x: Array, context: tuple[Array, Array | None], key: None) -> Array:
                return block(config, runtime, params, x, *context, asked=asked)[0]

            return read_layers(
                layer,
                {str(index): params[name] for index, name in enumerate(names)},
                x,
                (positions, mask),
                read=read,
                remat=runtime.remat,
                scan=scan,
                saved=RESIDUAL_NAMES,
            )

        x, before = run(names, x, runtime.scan_layers, None) if names else (x, None)
        x, kept = run([last], x, False, tracks)
        if kept is not None and before is not None:
            kept = jnp.concatenate([before, kept])
        return PointFeatures(points(x), kept), None
    # One layer after the other whatever `scan_layers` says: a scan would copy the memory at every step.
    after, every = {}, []
    for name in (*names, last):
        asked = tracks if name == last else None
        x, after[name] = block(config, runtime, params[name], x, positions, mask, states[name], asked)
        every.append(points(x))
    return PointFeatures(every[-1], jnp.stack(every) if layers else None), after


def point_features(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    params: Params,
    video: Video,
    queries: Queries,
    state: TAPNextState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    mask: TokenMask | None = None,
    layers: bool = False,
) -> tuple[PointFeatures, TAPNextState | None]:
    """`apply` without the heads and its checks: for losses that read one layer at a time out (`read_out`).

    Args:
      queries: what to track; those of the state are not looked at.
      mask: which tokens each token attends to.

    Returns:
      (the points' tokens, the state after the call; None if none was given).
    """
    video = constrain(video, ("batch", "length", None, None, None))
    positions = frame_positions(video, None if state is None else state.step, reset)
    image = image_tokens(config, runtime, params["image"], video)
    points = point_tokens(config, params["points"], queries, positions, runtime.residual_dtype)
    # XLA for GPUs (jax 0.11.2) would make one Triton kernel of the points' tokens, this and the first norm,
    # whose results are wrong in some clips of a batch.
    x = jax.lax.optimization_barrier(jnp.concatenate([image, points], axis=2))
    states = None if state is None else state.layers
    features, states = encode(
        config, runtime, params["layers"], x, positions, points.shape[2], mask, states, layers
    )
    if states is None:
        return features, None
    return features, TAPNextState(step=positions[:, -1] + 1, queries=queries, layers=states)


def key_mask(in_use: Bool[Array, "B Q"], patches: int, frames: int) -> Bool[Array, "B T 1 P"]:
    """Mask under which every token sees the image and the tracks in use."""
    keys = jnp.pad(in_use, ((0, 0), (patches, 0)), constant_values=True)[:, None, None]
    return constrain(jnp.repeat(keys, frames, axis=1), ("batch", "length", None, None))


def apply(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    params: Params,
    video: Video,
    query_tyx: Num[Array, "B Q *K 3"] | None = None,
    state: TAPNextState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    query_valid: Bool[Array, "B Q *K"] | None = None,
    in_use: Bool[Array, "B Q"] | None = None,
    layers: bool = False,
) -> tuple[TAPNextOutput, TAPNextState | None]:
    """Tracks points through a stretch of frames.

    Without a state the first frame starts a clip. With one the frames continue what earlier calls saw, in
    chunks of any length; any chunking gives the result of the whole pass. Points see each other: a track
    depends a little on which others are asked for. Under a mesh, everything is split over the batch.

    Args:
      params: canonical tree (`init_params`, `convert.load_official`), or made from one by `prepare_params`.
      video: [B, T, height, width, 3], RGB in [-1, 1], or uint8. Height and width may be other multiples of
        the patch size than the native ones: positions are resampled, and queries and tracks stay in native
        pixels, so callers scale them.
      query_tyx: [B, Q, 3] or [B, Q, K, 3], frame of the clip, y, x; see `make_queries`. With a state it may
        be None (the state's queries go on) or replace them; the new state holds what was used.
      state: memory of earlier calls (`init_state`), or None.
      reset: [B, T], True where a new clip starts: nothing crosses that boundary, and frames of queries are
        counted from there again.
      query_valid: False where a hint is padding; goes with `query_tyx`.
      in_use: [B, Q], False for tracks that nothing may attend to, such as rows that fill up a batch: the
        others are then as if those did not exist. None: all are seen, as in the official code.
      layers: also return the read-outs of every layer (the same heads, without the final norm).

    Returns:
      (TAPNextOutput, state after the call; None if none was given).

    Raises:
      ValueError: parameters that are not this config's (differences listed), wrong shapes, neither queries
        nor a state, or a state of another batch, number of tracks or resolution.
    """
    check_params(expected_shapes(param_specs(config), params), params, config)
    queries = _queries(query_tyx, query_valid, state)
    _check(config, video, queries, state, reset, in_use)
    mask = None
    if in_use is not None:
        mask = key_mask(in_use, count_patches(config, video), video.shape[1])
    features, state = point_features(
        config, runtime, params, video, queries, state, reset, mask=mask, layers=layers
    )
    final = read_out(config, params, features.last)
    every = None if features.layers is None else read_out(config, params, features.layers, last=False)
    return TAPNextOutput(*final, layers=every), state


def _queries(query_tyx: Array | None, query_valid: Array | None, state: TAPNextState | None) -> Queries:
    if query_tyx is not None:
        return make_queries(query_tyx, query_valid)
    if query_valid is not None:
        raise ValueError("query_valid describes query_tyx, which is None")
    if state is None:
        raise ValueError("query_tyx is None; a call without a state needs the queries, [B, Q, 3] (t, y, x)")
    return state.queries


def _check(
    config: TAPNextConfig,
    video: Array,
    queries: Queries,
    state: TAPNextState | None,
    reset: Array | None,
    in_use: Array | None,
) -> None:
    if video.ndim != 5 or video.shape[-1] != 3 or video.shape[1] < 1:
        raise ValueError(f"video has shape {video.shape}; it must be [B, T, height, width, 3] with T >= 1")
    if not jnp.issubdtype(video.dtype, jnp.floating) and video.dtype != jnp.uint8:
        raise ValueError(f"video has dtype {video.dtype}; it must be uint8, or floating point in [-1, 1]")
    patches = count_patches(config, video)
    batch, tracks = queries.frame.shape[:2]
    if batch != video.shape[0]:
        raise ValueError(f"the queries are of {batch} videos, video has {video.shape[0]} rows")
    if reset is not None and reset.shape != video.shape[:2]:
        raise ValueError(f"reset has shape {reset.shape}; it must be [B, T] = {video.shape[:2]}")
    if in_use is not None and in_use.shape != (batch, tracks):
        raise ValueError(f"in_use has shape {in_use.shape}; it must be [B, Q] = {(batch, tracks)}")
    if state is None:
        return
    rows, tokens = state.layers["0"].lru.shape[:2]
    if rows != batch:
        raise ValueError(f"state was made for {rows} rows, video has {batch}")
    if state.queries.frame.shape[1] != tracks:
        raise ValueError(
            f"state was made for {state.queries.frame.shape[1]} tracks, the queries are {tracks}:"
            " their number cannot change in mid-stream (see models.tapnext.slots)"
        )
    if tokens != patches + tracks:
        raise ValueError(
            f"state was made for {tokens - tracks} patches per frame, the frames of {video.shape[2:4]} pixels"
            f" have {patches}"
        )


def count_patches(config: TAPNextConfig, video: Video) -> int:
    """Patches of a frame of this video.

    Raises:
      ValueError: the patch size does not divide the frame.
    """
    try:
        rows, columns = grid_of((video.shape[2], video.shape[3]), config.patch_size)
    except ValueError as error:
        raise ValueError(f"video: {error}") from None
    return rows * columns


class TAPNext(ModelModule[TAPNextConfig, TAPNextRuntime]):
    """The model as a module. `nnx.split`, `nnx.state` and `jax.jit` see one `nnx.Param` per canonical name.

    Made for NNX's tree mode: no shared references, no lifted transforms. Take `model.params()` to train.
    """

    _specs, _init, _runtime = staticmethod(param_specs), staticmethod(init_params), TAPNextRuntime

    def __call__(
        self,
        video: Video,
        state: TAPNextState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        query_tyx: Num[Array, "B Q *K 3"] | None = None,
        query_valid: Bool[Array, "B Q *K"] | None = None,
        in_use: Bool[Array, "B Q"] | None = None,
        layers: bool = False,
    ) -> tuple[TAPNextOutput, TAPNextState | None]:
        """Tracks in the frames and the state after them; see `apply`. Queries come with the state or here."""
        return apply(
            self.config,
            self.runtime,
            self.params(),
            video,
            query_tyx,
            state,
            reset,
            query_valid=query_valid,
            in_use=in_use,
            layers=layers,
        )
