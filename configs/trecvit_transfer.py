"""TRecViT-S on many generated clips, then on real ones: the arrow of time, and playback speed.

    python -m tasks.video.data fetch --output=data/films
    python -m launch.sweep configs/trecvit_transfer.py --runs=runs/trecvit_transfer
    python -m tasks.video.eval --workdir=runs/trecvit_transfer/arrow-transfer \\
        --compare=runs/trecvit_transfer/arrow-scratch

Each real set is learnt from the weights that the generated clips left, and from scratch, by one recipe.

Arguments of the file, all optional: runs, the folder given as --runs; films, where the clips were fetched to;
train_clips, epochs, batch: of the generated set; film_epochs; workers: processes that decode.
"""

from typing import Any

from configs.common import parse_args

TOP1 = "held_out/top1"

# Name of a set of real clips: classes, training clips (of Debian 12's films).
FILMS = {"arrow": (2, 388), "speed": (3, 417)}


def get_sweep(arg: str | None = None) -> list[dict[str, Any]]:
    """The runs, in order; see `launch/sweep.py` for what each key means."""
    args = parse_args(
        arg,
        runs="runs/trecvit_transfer",
        films="data/films",
        train_clips=20_000,
        epochs=12.0,
        film_epochs=30.0,
        batch=128,
        workers=12,
    )
    shared = f"configs/trecvit.py:size=S,image=64,workers={args.workers}"
    # Mirrored, time runs as it did, and as fast.
    options = {"augment.flip": 0.5}
    runs: list[dict[str, Any]] = [
        {
            "name": "generated",
            "task": "video",
            "shows": TOP1,
            "config": f"{shared},train_clips={args.train_clips},epochs={args.epochs},batch={args.batch}",
        }
    ]
    for name, (classes, clips) in FILMS.items():
        config = (
            f"{shared},recipe=small,data=folder,path={args.films}/{name},classes={classes},videos={clips},"
            f"batch=32,lr=3e-4,epochs={args.film_epochs}"
        )
        for kind, init in (("transfer", f"{args.runs}/generated"), ("scratch", "")):
            runs.append(
                {
                    "name": f"{name}-{kind}",
                    "task": "video",
                    "shows": TOP1,
                    "config": f"{config},init={init}",
                    "set": options,
                }
            )
    return runs
