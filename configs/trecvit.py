"""TRecViT (arXiv 2412.14294): a causal video model of gated linear recurrences and attention.

    python -m tasks.video.train --config=configs/trecvit.py
        A small model on generated clips whose classes need time (embedded: made in seconds, cached): 10
        classes, minutes on two CPU cores. With control=single_frame or control=shuffled, the same budget
        without what time tells.

    python -m tasks.video.train --config=configs/trecvit.py:data=ssv2,path=data/ssv2,init=ViT-B_16.npz
        The paper's Something-Something recipe; data=kinetics is that of Kinetics-400.

    python -m tasks.video.train --config=configs/trecvit.py:objective=mae,data=kinetics,path=k400
    python -m tasks.video.train --config=configs/trecvit.py:objective=probe,data=kinetics,path=k400,init=DIR
        Masked auto-encoding, and a read-out trained on its frozen features. With data=kinetics (or any real
        videos) the paper's: 0.9 of the tubes hidden, normalised pixels. On generated clips half of the tubes
        are hidden and every patch's change from frame to frame is painted (config.mae.target=change).

Arguments: see `get_config`. What the paper does not say is marked below.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import VIT_WIDTHS, parse_args

DATA = ("generated", "ssv2", "kinetics", "folder", "records", "tfds")
OBJECTIVES = ("classes", "mae", "probe")
RECIPES = ("", "small", "paper")
CONTROLS = ("", "single_frame", "shuffled")
# width, layers, MLP size, heads of the models, as in models/trecvit, and of one for two CPU cores.
WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "mini": (64, 3, 192, 4),
    **VIT_WIDTHS,
}
# Training videos and classes of the official data sets; of others the arguments say.
KNOWN = {"ssv2": (168_913, 174), "kinetics": (234_619, 400), "generated": (2_000, 10)}

VARIANTS = (
    "",
    "control=single_frame",
    "control=shuffled",
    "objective=mae",
    "objective=probe",
    "data=generated,size=S",
    "data=ssv2,path=data/ssv2",
    "data=ssv2,path=data/ssv2,frames=64",
    "data=kinetics,path=data/k400",
    "data=kinetics,path=data/k400,size=L",
    "data=kinetics,path=data/k400,objective=mae",
    "data=kinetics,path=data/k400,objective=probe",
    "data=ssv2,path=data/ssv2,objective=probe",
    "data=folder,path=data/films/arrow,recipe=small,size=S,classes=2,videos=388",
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the colon. All arguments are optional.

    size: mini, mu, Ti, S, M, B, L, ...: of the model. "": mini for generated clips, else B.
    data, path: generated, ssv2, kinetics, folder, records or tfds, and where it lies.
    classes, videos: of a data set that is not known here (folder, records, tfds): its classes, and training
      videos in an epoch.
    objective: classes; mae: masked auto-encoding; probe: a read-out on frozen features of `init`.
    control: single_frame or shuffled: what can be known without time.
    init: weights to start from: a run's workdir, an official .npz, or an image ViT. The paper starts from
      an ImageNet-21k ViT-B.
    frames, stride: of a clip. image: side of the frames in pixels. 0: the data set's.
    batch, epochs: 0: the data set's. lr: peak learning rate; 0: the objective's.
    recipe: small (32 or 64 pixels, patches of 8) or paper. "": small for generated clips.
    train_clips: of the generated set; 0: 2,000.
    workers: processes that decode; 0: threads of this one; -1: the recipe's (0 for small, 8 for paper).
    seed: of initialisation, data order and draws.
    """
    args = parse_args(
        arg,
        size="",
        data="generated",
        path="",
        classes=0,
        videos=0,
        objective="classes",
        control="",
        init="",
        frames=0,
        stride=0,
        image=0,
        batch=0,
        epochs=0.0,
        lr=0.0,
        recipe="",
        train_clips=0,
        workers=-1,
        seed=0,
    )
    choices = {
        "recipe": RECIPES,
        "size": ("", *WIDTHS),
        "data": DATA,
        "objective": OBJECTIVES,
        "control": CONTROLS,
    }
    for name, allowed in choices.items():
        if args[name] not in allowed:
            shown = ", ".join(value or '""' for value in allowed)
            raise ValueError(f"config argument {name}={args[name]!r}: choose one of {shown}")
    args.size = args.size or ("mini" if args.data == "generated" else "B")
    videos, classes = KNOWN.get(args.data, (args.videos, args.classes))
    args.videos = args.train_clips or args.videos or videos
    args.classes = args.classes or classes
    if not args.videos or (not args.classes and args.objective != "mae"):
        raise ValueError(f"data={args.data} needs the arguments videos and classes: how many it has")
    args.recipe = args.recipe or ("small" if args.data == "generated" else "paper")
    sections = (_small if args.recipe == "small" else _paper)(args)
    _shorten(args, sections)
    return ConfigDict(sections).lock()


# Masked auto-encoding where classes are motions: most of the pixels of hidden tubes stand still.
_MOTION = {"mask_ratio": 0.5, "decoder_depth": 1, "target": "change", "normalize": False, "painted": "all"}


def _small(args: ConfigDict) -> dict[str, Any]:
    """Small frames and data sets: minutes on two CPU cores for the mini model, on a GPU for a larger one."""
    laptop, generated = args.size == "mini", args.data == "generated"
    side = args.image or (32 if laptop else 64)
    batch = args.batch or (32 if laptop else 128)
    lengths = {"classes": 16.0, "mae": 24.0, "probe": 12.0}
    rates = {"classes": 2e-3 if laptop else 5e-4, "mae": 1e-3, "probe": 2e-3}
    if args.objective == "mae" and laptop and generated:  # what changes is learnt in 500 steps
        lengths["mae"], rates["mae"], batch = 4.0, 2e-3, args.batch or 16
    epochs = args.epochs or lengths[args.objective]
    steps = _steps(args, epochs, batch)
    sections = {
        **_model(args, side=side, patch=8, frames=args.frames or 16, stride=args.stride or 1),
        "optim": _adamw(args.lr or rates[args.objective], 0.05, steps, warmup=steps // 20),
        "train": _train(args, steps, batch, eval_every=max(1, steps // 6)),
        "eval": {"batch_size": 50 if laptop else 200},
        "checkpoint": {"every": max(1, steps // 6)},
        "log": {"every": 20},
    }
    sections["model"] |= {"pool": "gap", "rep_size": 4 * WIDTHS[args.size][0]}
    if generated:
        sections["data"] |= {"generated_train": args.videos}
        sections["mae"] = dict(_MOTION)
    elif laptop:  # 4 of 16 tubes are seen, where a tenth would be 2
        sections["mae"] = {"mask_ratio": 0.75, "decoder_depth": 2}
    sections["runtime"] = {"compute_dtype": "float32" if laptop else "bfloat16"}
    return sections


def _paper(args: ConfigDict) -> dict[str, Any]:
    """The paper's recipes (section 4, appendix): Something-Something v2's for that, else Kinetics-400's."""
    ssv2, objective = args.data == "ssv2", args.objective
    frames = args.frames or (32 if objective == "classes" else 16)
    # Batch sizes are in no public text; nor are the warm-up of supervised runs (2.5 epochs in ViViT) and of
    # masked auto-encoding (40 in VideoMAE), its crops (VideoMAE's, about) and flips.
    batch = args.batch or {"classes": 64, "mae": 256, "probe": 64}[objective]
    lengths = {"classes": 35.0 if ssv2 else 30.0, "mae": 1600.0, "probe": 6.0 if ssv2 else 30.0}
    epochs = args.epochs or lengths[objective]
    steps = _steps(args, epochs, batch)
    warmup = {"classes": round(2.5 * steps / epochs), "mae": round(40 * steps / epochs), "probe": 1000}
    rate, decay = {"classes": (1e-4, 0.03), "mae": (3e-4, 0.05), "probe": (3e-4, 0.03)}[objective]
    side = args.image or 224
    sections = {
        **_model(args, side=side, patch=16, frames=frames, stride=args.stride or 2),
        "optim": _adamw(args.lr or rate, decay, steps, warmup=min(warmup[objective], steps)),
        "train": _train(args, steps, batch, eval_every=max(1, round(steps / epochs))),
        "eval": {"batch_size": 32, "videos": 4096},
        "checkpoint": {"every": max(1, round(steps / epochs / 2))},
        "log": {"every": 20},
        "runtime": {"compute_dtype": "bfloat16", "remat": "full", "scan_layers": True},
    }
    loaded = -(-side * 8 // 7)  # 256 for 224
    sections["data"] |= {"height": loaded, "width": loaded, "eval_clips": 4, "eval_crops": 3}
    sections["train"] |= {"num_workers": 8 if args.workers < 0 else args.workers}
    # Mirroring would turn Something-Something's left into right.
    augment = {"size": (side, side), "flip": 0.0 if ssv2 else 0.5}
    if objective == "mae":
        augment |= {"crop": "area", "area": (0.5, 1.0)}
    elif objective == "probe":
        augment |= {"scale": (0.9, 1.33)}
    else:
        augment |= {"scale": (0.875, 1.33), "label_smoothing": 0.1}
        if ssv2:
            # ViViT's two layers of magnitude 20, counted to 10.
            augment |= {"randaugment_layers": 2, "randaugment_magnitude": 20.0, "randaugment_full": 10.0}
            sections["model"] |= {"head_dropout": 0.1}
    sections["augment"] = augment
    return sections


def _steps(args: ConfigDict, epochs: float, batch: int) -> int:
    return max(1, round(epochs * args.videos / batch))


def _model(args: ConfigDict, *, side: int, patch: int, frames: int, stride: int) -> dict[str, Any]:
    """The sections that say what is seen by what."""
    width, depth, mlp_size, heads = WIDTHS[args.size]
    return {
        "seed": args.seed,
        "model": {
            "image_size": (side, side),
            "patch_size": (patch, patch),
            "width": width,
            "depth": depth,
            "mlp_size": mlp_size,
            "num_heads": heads,
            "head": {"classes": "classes", "mae": "none", "probe": "readout"}[args.objective],
            "num_classes": args.classes or 1,
            "frames_per_clip": frames,
        },
        "data": {
            "source": args.data,
            "path": args.path,
            "frames": frames,
            "stride": stride,
            "height": side,
            "width": side,
        },
        "augment": {"size": (side, side)},
    }


def _adamw(peak_lr: float, weight_decay: float, steps: int, *, warmup: int) -> dict[str, Any]:
    return {
        "peak_lr": peak_lr,
        "unit": "steps",
        "total": steps,
        "warmup": warmup,
        "schedule": "cosine",
        "weight_decay": weight_decay,
        "clip_norm": 1.0,
    }


def _train(args: ConfigDict, steps: int, batch: int, *, eval_every: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch,
        "eval_every": eval_every,
        "objective": "mae" if args.objective == "mae" else "classes",
        "trained": "head" if args.objective == "probe" else "all",
        "init_from": args.init,
        "num_workers": max(args.workers, 0),
    }


def _shorten(args: ConfigDict, sections: dict[str, Any]) -> None:
    """The controls: the same run without what time tells."""
    if args.control == "single_frame":
        sections["data"]["frames"] = 1
    elif args.control == "shuffled":
        sections["data"]["order"] = "shuffled"
