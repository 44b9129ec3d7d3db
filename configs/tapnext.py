"""TAPNext (arXiv 2504.05579): tracking any point as prediction of the next token of each point.

    python -m tasks.points.train --config=configs/tapnext.py
        A small tracker on generated clips with exact tracks (embedded: textures from photographs in installed
        packages), a quarter of an hour on two CPU cores. recipe=gpu: half an hour on one GPU.

    python -m tasks.points.train --config=configs/tapnext.py:recipe=paper,data=records,path=data/movi
        TAPNext-B on Kubric's MOVi-E/F, converted by `python -m tasks.points.data convert-movi`.

    python -m tasks.points.train --config=configs/tapnext.py:recipe=paper,init=FILE.npz,data=folder,path=DIR
        Fine-tuning from released weights on clips of one's own. With unlabelled=DIR, a folder of videos
        without tracks, a teacher's tracks of those are learnt as well (BootsTAP).

    python -m tasks.points.train --config=configs/tapnext.py:recipe=long,data=records,path=DIR,time=8
        Fine-tuning (init=FILE) on sequences of 1,024 frames split over 8 devices by time (TAPNext++).

Arguments: see `get_config`. What the papers do not say is marked below.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import VIT_WIDTHS, parse_args

DATA = ("generated", "folder", "npz", "pointodyssey", "records")
RECIPES = ("", "small", "gpu", "paper", "long")
# width, layers, MLP size, heads of the models, as in models/tapnext, and of two of our own: one for two CPU
# cores, and half of Ti, whose bfloat16 weights are a file of 13 MB.
WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "mini": (128, 2, 128, 4),
    "half": (192, 6, 768, 3),
    **VIT_WIDTHS,
}

VARIANTS = (
    "",
    "recipe=gpu,size=S",
    "recipe=paper,data=records,path=data/movi",
    "recipe=paper,data=records,path=data/movi,init=tapnext_ckpt.npz,unlabelled=data/videos",
    "recipe=paper,data=folder,path=data/own,init=tapnextpp_ckpt.pt,numerics=torch",
    "recipe=paper,data=pointodyssey,path=data/odyssey",
    "recipe=long,data=records,path=data/kubric_1024,init=bootstapnext_ckpt.npz,time=8",
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the colon. All arguments are optional.

    size: mini, half, mu, Ti, S, M, B, L, ...: of the model. "": the recipe's.
    data, path: generated, folder, npz, pointodyssey or records, and where it lies.
    init: weights to start from: a run's workdir, or a released .npz, .pt or .ckpt.
    numerics: jax, or torch for weights of TAPNext++.
    unlabelled: folder of videos without tracks, for self-training.
    frames, stride: of a clip. image: side of the frames in pixels. tracks: points of a clip. 0: the recipe's.
    batch, steps, lr: 0: the recipe's.
    recipe: small (64 pixels, two CPU cores), gpu (128 pixels, one GPU), paper, or long (TAPNext++). "": small
      for generated clips, else paper.
    time: devices that share the frames of every clip.
    workers: processes that read or draw clips; 0: threads of this one; -1: the recipe's.
    seed: of initialisation, data order and draws.
    """
    args = parse_args(
        arg,
        size="",
        data="generated",
        path="",
        init="",
        numerics="jax",
        unlabelled="",
        frames=0,
        stride=1,
        image=0,
        tracks=0,
        batch=0,
        steps=0,
        lr=0.0,
        recipe="",
        time=1,
        workers=-1,
        seed=0,
    )
    for name, allowed in {"size": ("", *WIDTHS), "data": DATA, "recipe": RECIPES}.items():
        if args[name] not in allowed:
            shown = ", ".join(value or '""' for value in allowed)
            raise ValueError(f"config argument {name}={args[name]!r}: choose one of {shown}")
    args.recipe = args.recipe or ("small" if args.data == "generated" else "paper")
    makers = {"small": _small, "gpu": _gpu, "paper": _paper, "long": _long}
    return ConfigDict(makers[args.recipe](args)).lock()


def _small(args: ConfigDict) -> dict[str, Any]:
    """Minutes on two CPU cores: some thousand clips, too few for a model to find out how to match.

    So it starts from maps that do (`train.initial`), and each place of the clips looks like itself only: a
    wash of colours over the textures, hardly any noise, no change of light. Things move far from frame to
    frame and hide each other.
    """
    steps = args.steps or 1800
    sections = {
        **_model(args, "mini", side=64, patch=4, frames=8, tracks=64),
        "optim": _adamw(args.lr or 2e-3, 0.05, steps, warmup=steps // 15, b2=0.95),
        "train": _train(args, steps, args.batch or 2, eval_every=max(1, steps // 6), workers=0),
        "eval": {"batch_size": 8, "clips": 32},
        "checkpoint": {"every": max(1, steps // 6)},
        "log": {"every": 10},
        "runtime": {"compute_dtype": "float32"},
    }
    if not args.size or args.size == "mini":
        sections["train"] |= {"initial": "matching"}
        sections["loss"] |= {"layers": 0.3}
    if args.data == "generated":
        sections["data"] |= {f"generated_{name}": value for name, value in _CLEAR_CLIPS.items()}
    return sections


# Of the small recipe's generated clips, see `PointsDataConfig`. Speeds are in sides of the frame per frame.
_CLEAR_CLIPS = {
    "fewest": 2,
    "most": 4,
    "smallest": 0.4,
    "largest": 0.8,
    "slowest": 0.12,
    "fastest": 0.3,
    "soonest": 0.8,
    "latest": 3.3,
    "camera": 1.0,
    "ripple": 0.0,
    "wash": 0.85,
    "exposure": 0.0,
    "noise": 2.0,
    "drift": 0.0,
    "compressed": 0.0,
}


def _gpu(args: ConfigDict) -> dict[str, Any]:
    """Half an hour on one GPU."""
    steps = args.steps or 10_000
    return {
        **_model(args, "half", side=128, patch=8, frames=24, tracks=64),
        "optim": _adamw(args.lr or 1e-3, 0.05, steps, warmup=min(500, steps)),
        "train": _train(args, steps, args.batch or 32, eval_every=max(1, steps // 8), workers=12),
        "eval": {"batch_size": 32},
        "checkpoint": {"every": max(1, steps // 8)},
        "log": {"every": 20},
        "runtime": {"compute_dtype": "bfloat16"},
    }


def _paper(args: ConfigDict) -> dict[str, Any]:
    """256 clips of 48 frames of 256 x 256 with 256 points, 300,000 steps (TAPNext, section 4).

    The optimiser is in no public text: TAPIR's on Kubric (AdamW 0.9, 0.95, peak 1e-3, 1,000 steps of warm-up,
    cosine to 0, weight decay 0.1, no clipping), fine-tuning at a tenth of its rate.
    """
    steps = args.steps or (1_500 if args.init else 300_000)
    rate = args.lr or (1e-4 if args.init else 1e-3)
    return {
        **_model(args, "B", side=256, patch=8, frames=48, tracks=256),
        "optim": _adamw(rate, 0.1, steps, warmup=min(1000, max(1, steps // 10)), b2=0.95, clip=None),
        "train": _train(args, steps, args.batch or 256, eval_every=max(1, steps // 30), workers=8),
        "eval": {"batch_size": 8, "clips": 64},
        "checkpoint": {"every": max(1, min(1000, steps // 5))},
        "log": {"every": 20},
        "runtime": {"compute_dtype": "bfloat16", "remat": "full", "scan_layers": True},
    }


def _long(args: ConfigDict) -> dict[str, Any]:
    """TAPNext++ (arXiv 2604.10582): 1,024 frames, hidden points at weight 0.2, roll and homography in 0.8 of
    the clips each. Batch size, steps and rate are in no public text."""
    args.frames, args.batch, args.steps = args.frames or 1024, args.batch or 8, args.steps or 10_000
    sections = _paper(args)
    sections["loss"] |= {"occluded": 0.2}
    sections["data"] |= {"augment_roll": 0.8, "augment_homography": 0.8}
    return sections


def _model(args: ConfigDict, size: str, *, side: int, patch: int, frames: int, tracks: int) -> dict[str, Any]:
    """The sections that say what is seen by what."""
    size, side = args.size or size, args.image or side
    width, depth, mlp_size, heads = WIDTHS[size]
    return {
        "seed": args.seed,
        "model": {
            "image_size": (side, side),
            "patch_size": (patch, patch),
            "width": width,
            "depth": depth,
            "mlp_size": mlp_size,
            "num_heads": heads,
            # S has 56 M parameters in the paper: its recurrence is as wide as B's.
            "lru_width": WIDTHS["B"][0] if size == "S" else None,
            "head_width": 128 if size == "mini" else 256,
            "numerics": args.numerics,
        },
        "data": {
            "source": args.data,
            "path": args.path,
            "frames": args.frames or frames,
            "stride": args.stride,
            "height": side,
            "width": side,
            "tracks": args.tracks or tracks,
        },
        "loss": {},
        "selftraining": {"path": args.unlabelled},
        "mesh": {"time": args.time},
    }


def _adamw(
    peak_lr: float,
    weight_decay: float,
    steps: int,
    *,
    warmup: int,
    b2: float = 0.99,
    clip: float | None = 1.0,
) -> dict[str, Any]:
    return {
        "peak_lr": peak_lr,
        "unit": "steps",
        "total": steps,
        "warmup": warmup,
        "schedule": "cosine",
        "weight_decay": weight_decay,
        "b2": b2,
        "clip_norm": clip,
    }


def _train(args: ConfigDict, steps: int, batch: int, *, eval_every: int, workers: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch,
        "eval_every": eval_every,
        "init_from": args.init,
        "ema": 0.999 if args.unlabelled else 0.0,
        "num_workers": workers if args.workers < 0 else args.workers,
    }
