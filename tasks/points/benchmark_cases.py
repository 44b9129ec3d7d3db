"""What the benchmark of TAPNext times, and the configuration of each case."""

import dataclasses
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from kernels.common.compiler import compiler_options
from tasks.common.bench import Goal
from tasks.common.config import load_config, override_all, with_defaults
from tasks.common.errors import ConfigError
from tasks.points.config import SCHEMA, PointsConfig, freeze_all

# Without gradients nothing is recomputed, and a scan over the layers would only stack their parameters.
PLAIN = "runtime.remat=none,runtime.scan_layers=false"
SETTABLE = ("runtime", "loss", "optim", "compiler", "train.batch_size")

Kind = Literal["streaming", "tracker", "offline", "recorded", "training"]
STREAMS = ("streaming", "tracker")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
      kind: "streaming", `tapnext.apply` with a state, one frame a call; "tracker", `SlotTracker.step`, one
        frame a call, from pixels on the host to tracks on the host; "offline", `tapnext.apply` on a whole
        clip; "recorded", `tapnext.track_clip`, from host to host; "training", the trainer's step.
      recipe, size, image: of configs/tapnext.py.
      points: tracked, all from the first frame on.
      frames, batch: of the clips; of streams 1.
      goal: None where nothing is required.
    """

    kind: Kind
    size: str
    points: int
    frames: int = 1
    batch: int = 1
    recipe: str = "paper"
    image: int = 256
    goal: Goal | None = None

    def label(self, batch: int | None = None) -> str:
        """What `only` is searched in and the row is called; `batch` if it is not the case's."""
        shape = f"{batch or self.batch} x {self.frames} x {self.image} x {self.image}"
        return f"{self.kind}, {self.size}, {shape}, {self.points} points"


# The floors that the goals were set by: the FLOPs at 700 TFLOP/s: 0.8 ms, 1.35 ms, 1,250 frames/s.
CASES = (
    Case("streaming", "B", 256, goal=Goal("ms", "2.85 (compiled, CUDA graphs, fp16)", 2.0, 1.4)),
    Case("streaming", "B", 1024, goal=Goal("ms", "23 (as shipped)", 3.2, 2.2)),
    Case("offline", "B", 256, 48, goal=Goal("frames/s", "268 (bf16)", 650, 900)),
    Case("training", "S", 256, 48, batch=8),
    Case("training", "B", 256, 48, batch=4),
    Case("tracker", "B", 256),
    Case("recorded", "B", 256, 48),
)


def _small(kind: Kind, frames: int = 1, batch: int = 1) -> Case:
    return Case(kind, "mini", 32, frames, batch, recipe="small", image=64)


STAND_INS = (
    _small("streaming"),
    _small("offline", 16),
    _small("training", 16, batch=8),
    _small("tracker"),
    _small("recorded", 16),
)


class Setup(NamedTuple):
    """How a case is run.

    Attributes:
      config: as the trainer takes it.
      cfg: the same, frozen.
      compiler: options of XLA.
    """

    config: ConfigDict
    cfg: PointsConfig
    compiler: dict[str, Any]


def prepare(case: Case, settings: str) -> Setup:
    """The configuration of a case.

    Raises:
      ConfigError: a setting that is wrong, or that would make another case of it.
    """
    for key in (setting.partition("=")[0] for setting in filter(None, settings.split(","))):
        section = key.partition(".")[0]
        if section not in SETTABLE and key not in SETTABLE:
            raise ConfigError(f"--set={key}: sizes are the cases'; what can be set is {', '.join(SETTABLE)}")
    # Its clips are never opened. A frame a call is no clip to train on: those of streams are the recipe's.
    frames = f",frames={case.frames}" if case.frames > 1 else ""
    given = load_config(
        f"configs/tapnext.py:recipe={case.recipe},size={case.size},image={case.image},tracks={case.points},"
        f"batch={case.batch}{frames}"
    )
    sections = {name: given[name] for name in given} | {"compiler": compiler_options()}
    config = with_defaults(ConfigDict(sections), {**SCHEMA, "compiler": dict})
    if case.kind != "training":
        override_all(config, PLAIN)
    override_all(config, settings)
    own = ConfigDict({name: config[name] for name in SCHEMA})
    return Setup(own, freeze_all(own), dict(config.compiler))
