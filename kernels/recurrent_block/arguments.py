"""Checks of arguments, and a call as dispatch sees it."""

from typing import Any

import jax

from kernels.common.dispatch import target
from kernels.recurrent_block.clips import empty_memory
from kernels.recurrent_block.config import CLIP, FRAME, BlockParams, Clip, Frame, Request

DTYPES = ("float16", "bfloat16", "float32", "float64")


def checked_request(call: Frame | Clip, params: BlockParams) -> Request:
    """What dispatch needs to know of a call.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names op and argument.
    """
    device = target()
    if isinstance(call, Frame):
        _check_frame(call, params)
        op, taps, h, batch, frames = FRAME, call.taps, call.h, 1, 1
    else:
        _check_clip(call, params)
        batch, frames = call.positions.shape
        memory = call.memory or jax.eval_shape(lambda: empty_memory(call, params))
        op, (taps, h) = CLIP, memory
    others = {str(x.dtype) for x in (*taps, *params._replace(gate_blocks=params.rate))}
    return Request(
        op, device.platform, device.capability, device.kind,
        str(call.branches.dtype), str(h.dtype), str(params.gate_blocks.dtype), tuple(sorted(others)),
        rows=h.shape[-2], width=h.shape[-1], block=params.gate_blocks.shape[1],
        taps=params.conv_kernel.shape[0], batch=batch, frames=frames,
    )  # fmt: skip


def _check_frame(frame: Any, params: Any) -> None:
    if frame.h.ndim != 2 or 0 in frame.h.shape:
        raise ValueError(f"{FRAME}: h must be [R, E] without an empty axis; got shape {frame.h.shape}.")
    rows, width = frame.h.shape
    _check_shapes(
        FRAME,
        {
            "branches": (frame.branches, (rows, 2 * width)),
            "positions": (frame.positions, (rows,)),
            **{f"taps[{number}]": (tap, (rows, width)) for number, tap in enumerate(frame.taps)},
        },
        len(frame.taps) + 1,
        width,
        params,
    )
    _check_state(FRAME, frame.h, frame.positions)


def _check_clip(clip: Any, params: Any) -> None:
    shape = clip.branches.shape
    if len(shape) != 4 or 0 in shape or shape[-1] % 2:
        raise ValueError(f"{CLIP}: branches must be [B, T, P, 2 E] without an empty axis; got shape {shape}.")
    batch, frames, tokens, width = shape
    width //= 2
    wanted = {"branches": (clip.branches, shape), "positions": (clip.positions, (batch, frames))}
    taps = params.conv_kernel.shape[0]
    if clip.memory is not None:
        taps = len(clip.memory.taps) + 1
        memory = {f"memory.taps[{number}]": tap for number, tap in enumerate(clip.memory.taps)}
        memory["memory.h"] = clip.memory.h
        wanted |= {name: (array, (batch, tokens, width)) for name, array in memory.items()}
    _check_shapes(CLIP, wanted, taps, width, params)
    _check_state(CLIP, None if clip.memory is None else clip.memory.h, clip.positions)


def _check_shapes(
    op: str, arrays: dict[str, tuple[Any, tuple[int, ...]]], taps: int, width: int, params: Any
) -> None:
    """Of a call's arrays, and of the parameters for J = taps and E = width."""
    groups, size = params.gate_blocks.shape[0], width // max(params.gate_blocks.shape[0], 1)
    wanted = arrays | {
        "conv_kernel": (params.conv_kernel, (taps, width)),
        "conv_bias": (params.conv_bias, (width,)),
        "gate_blocks": (params.gate_blocks, (groups, size, 2 * size)),
        "gate_bias": (params.gate_bias, (2 * width,)),
        "rate": (params.rate, (width,)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}; got {array.shape}.")
        if name != "positions" and str(array.dtype) not in DTYPES:
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; use one of {', '.join(DTYPES)}.")
    if groups * size != width:
        raise ValueError(f"{op}: {groups} groups do not divide E = {width}.")


def _check_state(op: str, h: Any, positions: Any) -> None:
    if h is not None and str(h.dtype) not in ("float32", "float64"):
        raise ValueError(f"{op}: h has dtype {h.dtype}; the state is float32 or float64.")
    if not str(positions.dtype).startswith("int"):
        raise ValueError(f"{op}: positions has dtype {positions.dtype}; they are whole numbers.")
