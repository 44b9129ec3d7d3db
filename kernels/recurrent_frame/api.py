"""Public function of one frame of a recurrent block: argument checks and choice of implementation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning, target
from kernels.recurrent_frame import pallas_mosaic_gpu, reference, xla
from kernels.recurrent_frame.config import Frame, FrameParams, FrameResult, Request

OP = "recurrent_frame"
DTYPES = ("float16", "bfloat16", "float32", "float64")


class RecurrentFrameImplementation(NamedTuple):
    """An implementation: whether it can take a call, and its differentiable entry point."""

    supports: Callable[[Request], str | None]
    recurrent_frame: Callable[[Frame, FrameParams], FrameResult]


IMPLEMENTATIONS: Mapping[str, RecurrentFrameImplementation] = {
    name: RecurrentFrameImplementation(module.supports, module.recurrent_frame)
    for name, module in (("pallas_mosaic_gpu", pallas_mosaic_gpu), ("xla", xla), ("reference", reference))
}
# The automatic choice: the first that takes a call.
PREFERENCE = ("pallas_mosaic_gpu", "xla")


def recurrent_frame(
    frame: Frame, params: FrameParams, *, implementation: str | Sequence[str] | None = None
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
    _check(frame, params)
    _, chosen = choose(OP, IMPLEMENTATIONS, request(frame, params), implementation, PREFERENCE)
    return chosen.recurrent_frame(frame, params)


def has_kernel(frame: Frame, params: FrameParams) -> bool:
    """Whether a kernel takes such a call. Else layers one by one do as well, and may know faster products.

    Raises:
      ValueError: as in the call.
    """
    _check(frame, params)
    return pallas_mosaic_gpu.supports(request(frame, params)) is None


def explain(frame: Frame, params: FrameParams, *, implementation: str | Sequence[str] | None = None) -> str:
    """Says which implementation would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.

    Raises:
      ValueError: as in the call.
    """
    _check(frame, params)
    return explain_choice(OP, IMPLEMENTATIONS, request(frame, params), implementation, PREFERENCE)


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter (R rows, E, S, J; the rest is default), for the command line.

    Raises:
      ValueError: a letter is not a size of this op, S does not divide E, or pruning is asked for.
    """
    check_sizes(OP, sizes, "RESJ")
    refuse_pruning(OP, pruning)
    rows, width, size, taps = (
        sizes.get(letter, default) for letter, default in (("R", 1280), ("E", 768), ("S", 64), ("J", 4))
    )
    if width % size:
        raise ValueError(f"{OP}: S = {size} does not divide E = {width}.")
    return explain(*shapes(rows, width, size, taps, dtype), implementation=implementation)


def shapes(rows: int, width: int, size: int, taps: int, dtype: str) -> tuple[Any, Any]:
    """Frame and parameters of these sizes as `jax.ShapeDtypeStruct`s, as models have them."""

    def like(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tap = like(rows, width, dtype=dtype)
    frame = Frame(
        like(rows, 2 * width, dtype=dtype), (tap,) * (taps - 1), like(rows, width), like(rows, dtype="int32")
    )
    blocks = like(width // size, size, 2 * size, dtype=dtype)
    params = FrameParams(like(taps, width), like(width), blocks, like(2 * width), like(width))
    return frame, params


def request(frame: Any, params: Any) -> Request:
    """What dispatch needs to know of a call."""
    device = target()
    others = {str(x.dtype) for x in (*frame.taps, *params._replace(gate_blocks=params.rate))}
    rows, width = frame.h.shape
    return Request(
        device.platform, device.capability, device.kind,
        str(frame.branches.dtype), str(frame.h.dtype), str(params.gate_blocks.dtype), tuple(sorted(others)),
        rows, width, block=params.gate_blocks.shape[1], taps=params.conv_kernel.shape[0],
    )  # fmt: skip


def _check(frame: Any, params: Any) -> None:
    """Raises ValueError unless these fit together."""
    if frame.h.ndim != 2 or 0 in frame.h.shape:
        raise ValueError(f"{OP}: h must be [R, E] without an empty axis; got shape {frame.h.shape}.")
    rows, width = frame.h.shape
    groups, size = params.gate_blocks.shape[0], width // max(params.gate_blocks.shape[0], 1)
    taps = len(frame.taps) + 1
    wanted = {
        "branches": (frame.branches, (rows, 2 * width)),
        "positions": (frame.positions, (rows,)),
        **{f"taps[{number}]": (tap, (rows, width)) for number, tap in enumerate(frame.taps)},
        "conv_kernel": (params.conv_kernel, (taps, width)),
        "conv_bias": (params.conv_bias, (width,)),
        "gate_blocks": (params.gate_blocks, (groups, size, 2 * size)),
        "gate_bias": (params.gate_bias, (2 * width,)),
        "rate": (params.rate, (width,)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{OP}: {name} must have shape {shape}; got {array.shape}.")
        if name != "positions" and str(array.dtype) not in DTYPES:
            raise ValueError(f"{OP}: {name} has dtype {array.dtype}; use one of {', '.join(DTYPES)}.")
    if groups * size != width:
        raise ValueError(f"{OP}: {groups} groups do not divide E = {width}.")
    if str(frame.h.dtype) not in ("float32", "float64"):
        raise ValueError(f"{OP}: h has dtype {frame.h.dtype}; the state is float32 or float64.")
    if not str(frame.positions.dtype).startswith("int"):
        raise ValueError(f"{OP}: positions has dtype {frame.positions.dtype}; they are whole numbers.")
