"""What time tells: a TRecViT on generated clips beside a model of one frame and one of shuffled frames.

    python -m launch.sweep configs/trecvit_controls.py --runs=runs/trecvit_controls
    python -m tasks.video.eval --workdir=runs/trecvit_controls/full --names=full,single,shuffled \\
        --compare=runs/trecvit_controls/single_frame,runs/trecvit_controls/shuffled

Every run has the same model, recipe, batches and number of steps. A single frame, or frames without their
order, can tell which pair of classes a clip belongs to, not which member: at most half of the clips.

Arguments of the file, all optional: epochs, size, seed as in `configs/trecvit.py`; stop, a step at which
every run ends on the way through the same schedule (0: at its end).
"""

from typing import Any

from configs.common import parse_args

TOP1 = "held_out/top1"


def get_sweep(arg: str | None = None) -> list[dict[str, Any]]:
    """The runs, in order; see `launch/sweep.py` for what each key means."""
    args = parse_args(arg, epochs=0.0, size="", seed=0, stop=0)
    shared = f"epochs={args.epochs},size={args.size},seed={args.seed}"
    controls = {"full": "", "single_frame": "single_frame", "shuffled": "shuffled"}
    return [
        {
            "name": name,
            "task": "video",
            "shows": TOP1,
            "config": f"configs/trecvit.py:control={control},{shared}",
            "set": {"train.steps": args.stop} if args.stop else {},
        }
        for name, control in controls.items()
    ]
