"""The learning rate against the official schedule, every run of the file (tests/golden/fox/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from tasks.common.optim import OptimConfig, learning_rate

WARMUP = 268_435_456  # tokens, the same for every official run; the file does not repeat it


@pytest.mark.golden("lr_schedule*.npz")
def test_schedule_matches_the_official_one(golden_file: Path) -> None:
    with np.load(golden_file) as file:
        runs = [key.removesuffix("_lr") for key in file.files if key.endswith("_lr")]
        assert runs
        for run in runs:
            config = OptimConfig(
                peak_lr=float(file[f"{run}_peak"]), total=int(file[f"{run}_max_tokens"]), warmup=WARMUP
            )
            ours = [learning_rate(config, int(tokens)) for tokens in file[f"{run}_tokens"]]
            np.testing.assert_allclose(ours, file[f"{run}_lr"], rtol=1e-12, atol=1e-30, err_msg=run)
