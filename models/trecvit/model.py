"""TRecViT (arXiv 2412.14294): patches, layers of recurrence over time and attention over space, a head.

`apply` is the model. `TRecViT` wraps it as an NNX module for those who want to hold parameters in an object.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Num

from kernels.linear_scan import RESIDUAL_NAMES
from models.common.joined import expected_shapes, is_joined
from models.common.layers import linear
from models.common.module import ModelModule
from models.common.params import ParamSpec, check_params, layer_keys
from models.common.recurrent_state import RecurrentState
from models.common.rglru import frame_positions, residual_block
from models.common.shapes import Key, Params
from models.common.sharding import constrain, gathered
from models.common.stack import run_layers
from models.common.vit import as_float, layer_norm, patchify, sincos_positions, vit_block
from models.trecvit import heads
from models.trecvit.config import TRecViTConfig, TRecViTRuntime
from models.trecvit.parameters import init_params, param_specs
from models.trecvit.state import ReadoutState, TRecViTState, padded_tokens

Output = Literal["logits", "clip", "encoded"]
Video = Num[Array, "B T height width 3"]
LayerStates = dict[str, RecurrentState]


def tokenize(
    config: TRecViTConfig, runtime: TRecViTRuntime, params: Params, video: Video
) -> Float[Array, "B T P D"]:
    """Patches times a matrix, plus their position; the class token, which has none, goes first.

    Args:
      params: canonical tree.
      video: pixels in [0, 1], or uint8.
    """
    group = params["tokenizer"]
    # Pixels are cast before they are cut up: a patch row is as large as the frame.
    pixels = patchify(as_float(video).astype(runtime.compute_dtype), config.patch_size)
    tokens = linear(pixels, group["patch"], runtime.compute_dtype)
    if config.positions == "learn":
        positions = gathered(group["positions"])
    else:
        positions = sincos_positions(config.grid, config.width)
    tokens = (tokens + positions).astype(runtime.residual_dtype)
    if config.pool == "gap":
        return tokens
    cls = jnp.broadcast_to(gathered(group["cls"]), (*tokens.shape[:2], 1, config.width))
    cls = constrain(cls.astype(tokens.dtype), ("batch", "length", None, None))
    return jnp.concatenate([cls, tokens], axis=2)


def block(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    x: Float[Array, "B T P D"],
    positions: Int[Array, "B T"],
    state: RecurrentState | None = None,
    rng: Key | None = None,
    keys: int | None = None,
) -> tuple[Float[Array, "B T P D"], RecurrentState]:
    """One layer: the recurrent block along every tube, then the ViT block in every frame.

    Args:
      params: the layer's group.
      positions: frames since the start of the clip.
      state: the layer's memory of earlier calls.
      rng: for dropout; None = none.
      keys: how many of the tokens, the first ones, others attend to; None: all.

    Returns:
      (tokens in x's dtype, the layer's memory after the call).
    """
    dtype = runtime.compute_dtype
    # Or XLA for GPU may lay the residual stream out as the gradient of the positions likes it, sums over the
    # batch, and spend a pass on every sum over channels.
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    x, state = residual_block(x, params, positions, state, dtype, runtime.scan_implementation)
    x = vit_block(
        x,
        params,
        config.num_heads,
        dtype,
        runtime.attention_implementation,
        config.dropout,
        rng,
        keys=keys,
    )
    return x, state


def encode(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    tokens: Float[Array, "B T P D"],
    positions: Int[Array, "B T"],
    states: LayerStates | None = None,
    rng: Key | None = None,
) -> tuple[Float[Array, "B T P D"], LayerStates | None]:
    """All layers and the final norm, for any number of tubes.

    Args:
      params: a tree with "layers" and "norm".
      states: memory of the layers by name; None = whole clips, and none is returned.
    """
    layers, count = params["layers"], tokens.shape[2]
    inside = count
    if states is not None:
        inside = states["0"].lru.shape[1]
    elif is_joined(params):
        inside = padded_tokens(count)
    keys = None if inside == count else count
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, inside - count), (0, 0)))
    if states is None:

        def layer(params: Params, x: Array, positions: Array, key: Key | None) -> Array:
            return block(config, runtime, params, x, positions, None, key, keys)[0]

        x = run_layers(
            layer,
            layers,
            tokens,
            positions,
            remat=runtime.remat,
            scan=runtime.scan_layers,
            saved=RESIDUAL_NAMES,
            rng=rng,
        )
        return layer_norm(x[:, :, :count], params["norm"]), None
    # One layer after the other whatever `scan_layers` says: a scan would copy the memory at every step.
    x, after = tokens, {}
    rngs = [None] * len(layers) if rng is None else list(jax.random.split(rng, len(layers)))
    for name, key in zip(layer_keys(layers), rngs, strict=True):
        x, after[name] = block(config, runtime, layers[name], x, positions, states[name], key, keys)
    return layer_norm(x[:, :, :count], params["norm"]), after


def apply(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    video: Video,
    state: TRecViTState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    output: Output = "logits",
    rng: Key | None = None,
) -> tuple[Any, TRecViTState | None]:
    """Runs the model on a stretch of frames.

    Without a state the first frame starts a clip. With one the frames continue what earlier calls saw, in
    chunks of any length; any chunking gives the result of the whole pass. Under a mesh, everything is split
    over the batch.

    Args:
      params: canonical tree (`init_params`), or made from one by `prepare_params`.
      video: [B, T, height, width, 3], pixels in [0, 1], or uint8.
      state: memory of earlier calls (`init_state`), or None.
      reset: [B, T], True where a new clip starts: nothing crosses that boundary (recurrence, convolution,
        averages).
      output: "logits", per frame, what the head says of the clip up to it: [B, T, C], or [B, T, rows,
        columns, C] for the dense head; "clip", a `ClipOutput` for the whole video, cut into clips of
        `frames_per_clip` (needs state = reset = None); "encoded", the normalised tokens [B, T, P, D].
      rng: key for dropout; None = none.

    Returns:
      (output in float32 - "encoded" in the residual dtype -, state after the call; None if none was given).

    Raises:
      ValueError: parameters that are not this config's (differences listed), wrong shapes, a state of another
        batch or resolution, frames that do not divide into clips, or an output the head does not have.
    """
    _check(config, param_specs(config), params, video, state, reset)
    _check_output(config, state, reset, output)
    video = constrain(video, ("batch", "length", None, None, None))
    clips = 1
    if output == "clip":
        clips, size = heads.split_clips(video.shape[1], config.frames_per_clip)
    positions = frame_positions(video, None if state is None else state.length, reset)
    if clips > 1:
        positions = positions % size  # clips are packed one after the other: each starts from nothing
    layer_rng, head_rng = (None, None) if rng is None else jax.random.split(rng)
    tokens = tokenize(config, runtime, params, video)
    states = None if state is None else state.layers
    encoded, states = encode(config, runtime, params, tokens, positions, states, layer_rng)
    memory = None if state is None else state.head
    result: Any
    if output == "encoded":
        result = encoded
        if state is not None and config.head in ("classes", "readout"):
            _, memory = _logits(config, runtime, params, encoded, positions, memory, head_rng)
    elif output == "logits":
        result, memory = _logits(config, runtime, params, encoded, positions, memory, head_rng)
    elif config.head == "classes":
        result = heads.clip_classes(config, runtime, params, encoded, clips, head_rng)
    else:
        result = heads.clip_readout(config, runtime, params, encoded, positions, clips, head_rng)
    if state is None or states is None:
        return result, None
    return result, TRecViTState(length=positions[:, -1] + 1, layers=states, head=memory)


def _logits(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    encoded: Array,
    positions: Array,
    memory: Array | ReadoutState | None,
    rng: Key | None,
) -> tuple[Array, Array | ReadoutState | None]:
    if config.head == "dense":
        return heads.dense_classes(config, runtime, params, encoded, rng), None
    if config.head == "readout":
        assert memory is None or isinstance(memory, ReadoutState)
        return heads.stream_readout(config, runtime, params, encoded, positions, memory, rng)
    assert not isinstance(memory, ReadoutState)
    return heads.stream_classes(config, runtime, params, encoded, positions, memory, rng)


def _check_output(
    config: TRecViTConfig, state: TRecViTState | None, reset: Array | None, output: Output
) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output = {output!r}; it must be one of {list(get_args(Output))}")
    if config.head == "none" and output != "encoded":
        raise ValueError(f"output = {output!r}; a model with head 'none' has 'encoded' only")
    if output == "clip":
        if config.head == "dense":
            raise ValueError("output = 'clip'; the dense head classifies patches: 'logits' or 'encoded'")
        if state is not None or reset is not None:
            raise ValueError('output="clip" describes whole videos; state and reset must be None')


def check_video(
    config: TRecViTConfig, video: Array, batch: int | None, reset: Array | None, tubes: int | None = None
) -> None:
    """Raises ValueError for a video, reset or state (its batch and tubes) that do not fit together."""
    if video.ndim != 5 or video.shape[-1] != 3 or video.shape[1] < 1:
        raise ValueError(f"video has shape {video.shape}; it must be [B, T, height, width, 3] with T >= 1")
    if video.shape[2:4] != config.image_size:
        raise ValueError(
            f"the frames are {video.shape[2:4]} (height, width), the model's are {config.image_size};"
            " resize the frames, or the model with `resize_params`"
        )
    if reset is not None and reset.shape != video.shape[:2]:
        raise ValueError(f"reset has shape {reset.shape}; it must be [B, T] = {video.shape[:2]}")
    if batch is not None and batch != video.shape[0]:
        raise ValueError(f"state was made for {batch} rows, video has {video.shape[0]}")
    if tubes is not None and tubes not in (config.num_tokens, padded_tokens(config.num_tokens)):
        raise ValueError(f"state was made for {tubes} tokens per frame, the model has {config.num_tokens}")


def _check(
    config: TRecViTConfig,
    specs: dict[str, ParamSpec],
    params: Params,
    video: Array,
    state: TRecViTState | None,
    reset: Array | None,
) -> None:
    check_params(expected_shapes(specs, params), params, config)
    batch = None if state is None else state.length.shape[0]
    tubes = None if state is None else state.layers["0"].lru.shape[1]
    check_video(config, video, batch, reset, tubes)


class TRecViT(ModelModule[TRecViTConfig, TRecViTRuntime]):
    """The model as a module. `nnx.split`, `nnx.state` and `jax.jit` see one `nnx.Param` per canonical name.

    Made for NNX's tree mode: no shared references, no lifted transforms. Take `model.params()` to train.
    """

    _specs, _init, _runtime = staticmethod(param_specs), staticmethod(init_params), TRecViTRuntime

    def __call__(
        self,
        video: Video,
        state: TRecViTState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        output: Output = "logits",
        rng: Key | None = None,
    ) -> tuple[Any, TRecViTState | None]:
        """The output for the frames and the state after them; see `apply`."""
        return apply(self.config, self.runtime, self.params(), video, state, reset, output, rng)
