"""Training a point tracker on a mesh: simulated devices that share clips, weights or frames do what one does,
and runs move between meshes."""

from pathlib import Path

import pytest

from tasks.common.writer import read_records
from tests.conftest import RunPython
from tests.integration.points_runs import SMALL, config, evaluated, losses, write_films

STEPS = 5


class Command:
    """`python -m tasks.points.train` on a mesh of simulated devices, in a process of its own."""

    def __init__(self, run_python: RunPython, folder: Path):
        self.run_python, self.folder, self.args = run_python, folder, write_films(folder / "clips")

    def __call__(self, name: str, steps: int, *, data: int = 1, fsdp: int = 1, time: int = 1) -> list[dict]:
        workdir, devices = self.folder / name, data * fsdp * time
        self.run_python(
            "-m", "tasks.points.train", *SMALL, f"--config={config(self.args)}", f"--workdir={workdir}",
            f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.time={time}",
            f"--config.train.steps={steps}", f"--config.train.eval_every={STEPS}", "--config.model.depth=1",
            "--config.data.augment_flip_horizontal=0.5", "--config.optim.peak_lr=0.002",
            "--config.eval.lucas_kanade=false", "--config.eval.pictures=0",
            devices=devices, timeout=600,
            env={
                # Nearly all of the time goes into compiling.
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
                "--xla_backend_optimization_level=0",
            },
        )  # fmt: skip
        return read_records(workdir)


@pytest.mark.slow  # compiles the step on three meshes
def test_meshes_equal_one_device_and_runs_move_between_them(run_python: RunPython, tmp_path: Path) -> None:
    """5 steps on 2 x 2 devices that share clips and weights, then 5 on 2 devices that share the frames of
    every clip (for sequences longer than a device holds): losses and evaluations are those of one device."""
    command = Command(run_python, tmp_path)
    alone = command("alone", 2 * STEPS)
    moving = command("moving", STEPS, data=2, fsdp=2)
    assert evaluated(moving) == evaluated(alone, "validation")
    moved = command("moving", 2 * STEPS, time=2)
    assert evaluated(moved) == evaluated(alone)
    # Sums are taken in another order; nothing else differs.
    for metric, tolerance in {"loss": 5e-6, "coordinate": 5e-6, "layers": 5e-6, "grad_norm": 1e-4}.items():
        assert losses(moved, metric) == pytest.approx(losses(alone, metric), rel=tolerance), metric
