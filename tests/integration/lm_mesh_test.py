"""Training on a mesh: eight simulated devices do what one does, and runs move between meshes."""

from pathlib import Path

import pytest

from tasks.common.writer import read_records
from tests.conftest import RunPython
from tests.integration.lm_runs import TINY, losses, write_texts

STEPS = 5


def _train(
    run_python: RunPython, texts: Path, workdir: Path, devices: int, data: int, fsdp: int, steps: int = STEPS
) -> list[float]:
    run_python(
        "-m", "tasks.lm.train", *TINY, f"--workdir={workdir}",
        f"--config=configs/fox.py:size=tiny,ctx=64,batch=8,tokens=10k,data=text,path={texts},vocab=259",
        f"--config.train.steps={steps}", f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}",
        devices=devices, env={"FOXTROT_CACHE": str(texts.parent / "cache")},
    )  # fmt: skip
    return losses(read_records(workdir))


@pytest.mark.slow  # compiles the step on four meshes
def test_eight_devices_equal_one_and_runs_move_between_meshes(run_python: RunPython, tmp_path: Path) -> None:
    """data=2 x fsdp=4 against one device over 5 steps; then resumed on 4, 2 and 1 devices, a step each."""
    texts = write_texts(tmp_path / "texts")
    alone = _train(run_python, texts, tmp_path / "one", 1, 1, 1, steps=STEPS + 3)
    together = _train(run_python, texts, tmp_path / "many", 8, 2, 4)
    # The sums over rows are taken in another order; nothing else differs.
    assert together == pytest.approx(alone[:STEPS], rel=2e-6)
    for steps, devices in ((STEPS + 1, 4), (STEPS + 2, 2), (STEPS + 3, 1)):
        together = _train(run_python, texts, tmp_path / "many", devices, devices, 1, steps=steps)
    assert together == pytest.approx(alone, rel=5e-6)
