"""Public functions of recurrent blocks: argument checks and choice of implementation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning
from kernels.recurrent_block import pallas_mosaic_gpu, reference, xla
from kernels.recurrent_block.arguments import checked_request
from kernels.recurrent_block.config import (
    CLIP,
    FRAME,
    BlockParams,
    Clip,
    ClipResult,
    Frame,
    FrameResult,
    Memory,
    Request,
)

OP = "recurrent_block"


class RecurrentImplementation(NamedTuple):
    """An implementation: whether it can take a call, and its differentiable entry points."""

    supports: Callable[[Request], str | None]
    recurrent_frame: Callable[[Frame, BlockParams], FrameResult]
    recurrent_clip: Callable[[Clip, BlockParams], ClipResult]


IMPLEMENTATIONS: Mapping[str, RecurrentImplementation] = {
    name: RecurrentImplementation(module.supports, module.recurrent_frame, module.recurrent_clip)
    for name, module in (("pallas_mosaic_gpu", pallas_mosaic_gpu), ("xla", xla), ("reference", reference))
}
# The automatic choice: the first that takes a call.
PREFERENCE = ("pallas_mosaic_gpu", "xla")


def recurrent_frame(
    frame: Frame, params: BlockParams, *, implementation: str | Sequence[str] | None = None
) -> FrameResult:
    """RG-LRU(conv(x)) * gelu(y) of one frame (Griffin, arXiv 2402.19427, sections 2.3 and 2.4).

        v_t = b + sum_s w[J-1-s] x_(t-s)                 s = 0 ... J - 1, within the segment
        i, r = sigmoid(blocks v_t + bias)                log a = -rate r
        h_t = a h_(t-1) + sqrt(1 - a^2) i v_t            i v_t at a start
        result: h_t gelu(y_t)

    Made for streams: one frame, whose memory is on the device. Differentiable in all arrays of numbers;
    gradients of every implementation but `reference` are XLA's, computed from the inputs.

    Args:
      frame: the frame and the memory before it.
      params: of the block.
      implementation: None (automatic), a name (that one or an error), or names tried in order.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
      ImplementationError: the named implementation cannot take the call; the message says why.
    """
    call = checked_request(frame, params)
    _, chosen = choose(FRAME, IMPLEMENTATIONS, call, implementation, PREFERENCE)
    return chosen.recurrent_frame(frame, params)


def recurrent_clip(
    clip: Clip, params: BlockParams, *, implementation: str | Sequence[str] | None = None
) -> ClipResult:
    """`recurrent_frame` of all frames of a clip, one after the other, from the memory of those before.

    Made for inference: gradients of every implementation but `reference` are XLA's, frame by frame, computed
    from the inputs. To train, run the layers one by one (`models.common.rglru`).

    Args:
      clip: frames, and the memory before them.
      params: of the block.
      implementation: as in `recurrent_frame`.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
      ImplementationError: the named implementation cannot take the call; the message says why.
    """
    call = checked_request(clip, params)
    _, chosen = choose(CLIP, IMPLEMENTATIONS, call, implementation, PREFERENCE)
    return chosen.recurrent_clip(clip, params)


def has_kernel(call: Frame | Clip, params: BlockParams) -> bool:
    """Whether a kernel takes such a call and is worth it. Else layers one by one do as well, and may know
    faster products.

    Raises:
      ValueError: as in the call.
    """
    return pallas_mosaic_gpu.is_worth_it(checked_request(call, params))


def explain(
    call: Frame | Clip, params: BlockParams, *, implementation: str | Sequence[str] | None = None
) -> str:
    """Says which implementation would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.

    Raises:
      ValueError: as in the call.
    """
    wanted = checked_request(call, params)
    return explain_choice(wanted.op, IMPLEMENTATIONS, wanted, implementation, PREFERENCE)


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter for both ops, for the command line.

    Letters: R rows (of a clip: the tokens of a frame), E, S, J; of a clip B and T. The rest is default.

    Raises:
      ValueError: a letter is not a size of this op, S does not divide E, or pruning is asked for.
    """
    check_sizes(OP, sizes, "BTRESJ")
    refuse_pruning(OP, pruning)
    defaults = {"B": 1, "T": 32, "R": 1280, "E": 768, "S": 64, "J": 4}
    batch, frames, rows, width, size, taps = (sizes.get(letter, defaults[letter]) for letter in defaults)
    if width % size:
        raise ValueError(f"{OP}: S = {size} does not divide E = {width}.")
    calls = (
        shapes(rows, width, size, taps, dtype),
        clip_shapes(batch, frames, rows, width, size, taps, dtype),
    )
    return "\n".join(explain(*call, implementation=implementation) for call in calls)


def shapes(rows: int, width: int, size: int, taps: int, dtype: str) -> tuple[Frame, BlockParams]:
    """Frame and parameters of these sizes as `jax.ShapeDtypeStruct`s, as models have them."""
    tap = _like(rows, width, dtype=dtype)
    frame = Frame(
        _like(rows, 2 * width, dtype=dtype),
        (tap,) * (taps - 1),
        _like(rows, width),
        _like(rows, dtype="int32"),
    )
    blocks = _like(width // size, size, 2 * size, dtype=dtype)
    params = BlockParams(_like(taps, width), _like(width), blocks, _like(2 * width), _like(width))
    return frame, params


def clip_shapes(
    batch: int, frames: int, tokens: int, width: int, size: int, taps: int, dtype: str
) -> tuple[Clip, BlockParams]:
    """The same of a clip and the memory before it."""
    _, params = shapes(tokens, width, size, taps, dtype)
    tap = _like(batch, tokens, width, dtype=dtype)
    memory = Memory((tap,) * (taps - 1), _like(batch, tokens, width))
    branches = _like(batch, frames, tokens, 2 * width, dtype=dtype)
    return Clip(branches, _like(batch, frames, dtype="int32"), memory), params


def _like(*shape: int, dtype: str = "float32") -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
