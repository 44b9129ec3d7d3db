"""Video training on a mesh: eight simulated devices do what one does, and runs move between meshes."""

from pathlib import Path

import pytest

from tasks.common.writer import read_records
from tests.conftest import RunPython
from tests.integration.video_runs import SMALL, config, held_out, losses, write_folder

STEPS = 5


def _train(
    run_python: RunPython, args: str, workdir: Path, devices: int, data: int, fsdp: int, steps: int = STEPS
) -> list[dict]:
    run_python(
        "-m", "tasks.video.train", *SMALL, f"--workdir={workdir}", f"--config={config(f'{args},batch=8')}",
        f"--config.train.steps={steps}", f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}",
        "--config.augment.mixup_alpha=0.8", "--config.augment.flip=0.5",
        devices=devices,
        # Every start compiles; the second one on a single device does not. Two simulated devices on two
        # cores share two threads, of which one that waits for the other's sum may hold up the other.
        env={
            "NPROC": "8",
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        },
    )  # fmt: skip
    return read_records(workdir)


@pytest.mark.slow  # compiles the step on three meshes
def test_eight_devices_equal_one_and_runs_move_between_meshes(run_python: RunPython, tmp_path: Path) -> None:
    """data=2 x fsdp=4 against one device over 5 steps and an evaluation; then resumed on 2 devices and 1."""
    args = write_folder(tmp_path / "films").args
    alone = _train(run_python, args, tmp_path / "one", 1, 1, 1)
    together = _train(run_python, args, tmp_path / "many", 8, 2, 4)
    # The sums over rows are taken in another order; nothing else differs.
    assert losses(together) == pytest.approx(losses(alone), rel=2e-6)
    assert held_out(together) == held_out(alone)
    alone = _train(run_python, args, tmp_path / "one", 1, 1, 1, STEPS + 2)
    for steps, devices in ((STEPS + 1, 2), (STEPS + 2, 1)):
        together = _train(run_python, args, tmp_path / "many", devices, 1, devices, steps)
    assert losses(together) == pytest.approx(losses(alone), rel=5e-6)
    assert held_out(together) == held_out(alone)
