"""Masked auto-encoding without labels, then a read-out on the frozen features; beside features never trained.

    python -m launch.sweep configs/trecvit_mae.py --runs=runs/trecvit_mae
    python -m tasks.video.eval --workdir=runs/trecvit_mae/probe-mae-0 \\
        --compare=runs/trecvit_mae/probe-random-0

Of each seed: an auto-encoder on the generated clips, a probe of its encoder, and a probe of an encoder as it
was initialised. Both probes train the same read-out on the same batches. The auto-encoder paints what changes
from frame to frame (`mae.target`, see tasks/video/README.md): the clips' classes are motions. One that paints
pixels: `python -m tasks.video.train --config=configs/trecvit.py:objective=mae --config.mae.target=pixels
--config.mae.normalize=true`.

Arguments of the file, all optional: runs, the folder given as --runs; seeds, how many; size, image, workers,
epochs of pre-training and probe_epochs as in `configs/trecvit.py`.
"""

from typing import Any

from configs.common import parse_args

TOP1 = "held_out/top1"


def get_sweep(arg: str | None = None) -> list[dict[str, Any]]:
    """The runs, in order; see `launch/sweep.py` for what each key means."""
    args = parse_args(
        arg, runs="runs/trecvit_mae", seeds=3, size="", image=0, epochs=0.0, probe_epochs=0.0, workers=0
    )
    runs = []
    for seed in range(args.seeds):
        shared = f"configs/trecvit.py:size={args.size},image={args.image},seed={seed},workers={args.workers}"
        probe = f"{shared},objective=probe,epochs={args.probe_epochs}"
        runs += [
            {
                "name": f"mae-{seed}",
                "task": "video",
                "config": f"{shared},objective=mae,epochs={args.epochs}",
            },
            {
                "name": f"probe-mae-{seed}",
                "task": "video",
                "shows": TOP1,
                "config": f"{probe},init={args.runs}/mae-{seed}",
            },
            {"name": f"probe-random-{seed}", "task": "video", "shows": TOP1, "config": probe},
        ]
    return runs
