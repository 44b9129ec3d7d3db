"""Exporting a run: one file, its checksum, a card that says what the run was, no folders of this machine."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.common.params import flatten_names, unflatten_names
from models.tapnext import count_params, param_specs
from tasks.common.checkpoint import Restored, load_params
from tasks.common.config import load_config, save_resolved, to_json, with_defaults
from tasks.common.errors import ConfigError
from tasks.points import export as exporting
from tasks.points.config import SCHEMA, freeze_all
from tasks.points.export import main, without_folders
from tasks.points.trained import initial_params, open_model
from tasks.points.weight_files import load_weights
from tests.integration.points_runs import frozen, run

COMMAND = [
    "/srv/someone/foxtrot/tasks/points/train.py",
    "--config=/data/sets/my.py:size=mini",
    "--workdir=/a/b/run1",
]
FIGURES = {
    "held_out": {"average_jaccard": 0.41, "delta_avg": 0.523, "delta_avg_after_occlusion": 0.3},
    "static": {"average_jaccard": 0.2, "delta_avg": 0.251, "delta_avg_after_occlusion": "nan"},
    "lucas_kanade": {"average_jaccard": 0.5, "delta_avg": 0.6, "delta_avg_after_occlusion": 0.01},
}


class Run:
    """A workdir without checkpoints: these are given by hand."""

    def __init__(self, folder: Path, **changes: Any):
        config = with_defaults(load_config("configs/tapnext.py:recipe=small,image=32,frames=4"), SCHEMA)
        values = to_json(config, keep_tuples=True)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            values[section][name] = value
        self.config, self.workdir = freeze_all(values), folder / "run1"
        save_resolved(self.workdir, to_json(values), command=COMMAND)
        rng = np.random.default_rng(0)
        specs = param_specs(self.config.model)
        self.params = unflatten_names(
            {n: rng.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
        )
        self.step = self.config.train.steps

    def log_figures(self) -> None:
        lines = [
            {"kind": "eval", "step": self.step} | {f"{name}/{metric}": value for metric, value in row.items()}
            for name, row in FIGURES.items()
        ]
        text = "\n".join(map(json.dumps, [{"kind": "train", "step": 0, "loss": 1.0}, *lines]))
        (self.workdir / "metrics.jsonl").write_text(text + "\n")


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**changes: Any) -> Run:
        made = Run(tmp_path, **changes)
        monkeypatch.setattr(
            exporting, "load_checkpoint", lambda path, step: Restored(step or made.step, made.params, {})
        )
        return made

    return make


def test_what_is_exported_is_the_run(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run()
    made.log_figures()
    output = tmp_path / "out" / "tapnext-mini.safetensors"
    main([f"--workdir={made.workdir}", f"--output={output}"])
    found = load_weights(output)
    assert found.config == made.config.model
    for name, value in flatten_names(made.params).items():
        np.testing.assert_allclose(flatten_names(found.params)[name], value, rtol=2**-8, err_msg=name)
    assert found.training["step"] == made.step
    assert found.training["figures"]["held_out"]["delta_avg"] == 0.523
    assert found.training["figures"]["static"]["delta_avg_after_occlusion"] is None
    assert found.training["config"]["optim"] == to_json(made.config.optim)
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    assert f"sha256 {digest}" in printed
    assert f"{count_params(made.config.model):,} parameters" in printed
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["sha256"] == digest
    assert record["size"] == output.stat().st_size
    card = output.with_suffix(".md").read_text()
    assert digest in card
    main([f"--workdir={made.workdir}", f"--output={tmp_path / 'again.safetensors'}"])
    assert (tmp_path / "again.safetensors").read_bytes() == output.read_bytes()


def test_the_card_says_what_it_was_trained_on_how_good_it_is_and_where_it_fails(
    make_run: Any, tmp_path: Path
) -> None:
    made = make_run(data__generated_seed=3)
    made.log_figures()
    notes = tmp_path / "notes.txt"
    notes.write_text("Thin things are lost, as a look at two films showed.\n")
    output = tmp_path / "x.safetensors"
    main([f"--workdir={made.workdir}", f"--output={output}", f"--notes={notes}", "--licence=CC0-1.0"])
    card = output.with_suffix(".md").read_text()
    assert re.findall("^#.*", card, re.MULTILINE) == [
        "# x", "## Trained on", "## How good", "## Where it fails", "## Licence",
    ]  # fmt: skip
    train = made.config.train
    assert f"{train.steps:,} steps of {train.batch_size} clips: clips of the embedded generator" in card
    assert "4 frames of 32 x 32 pixels" in card
    assert "python -m tasks.points.train --config=my.py:size=mini --workdir=run1" in card
    rows = {line.split(" | ")[0].strip("| "): line for line in card.splitlines() if line.startswith("| ")}
    assert "| 41.0 | 52.3 | - | - | 30.0 |" in rows["model"]
    assert "| 20.0 | 25.1 | - | - | - |" in rows["points do not move"]
    assert "Lucas-Kanade is closer on the held-out clips (delta_avg 60.0 against 52.3)" in card
    assert "After an occlusion it is within the thresholds 30.0 % of the time" in card
    assert "It has seen no real video" in card
    assert "Thin things are lost" in card
    assert "per cent, before the weights were rounded to bfloat16:" in card
    assert "CC0-1.0. The licences of the photographs that the packages scikit-image" in card


def test_the_card_of_other_data(make_run: Any, tmp_path: Path) -> None:
    made = make_run(
        data__source="records", data__path="/secret/place/movi", train__init_from="/secret/place/boots.npz",
        train__ema=0.99, selftraining__path="/secret/place/street",
    )  # fmt: skip
    output = tmp_path / "x.safetensors"
    main([f"--workdir={made.workdir}", f"--output={output}", "--step=5"])
    card = output.with_suffix(".md").read_text()
    assert "5 steps of" in card
    assert "prepared clips with tracks (movi)" in card
    assert "Started from boots.npz." in card
    assert "self-training on unlabelled videos (street)" in card
    assert "Not measured: the run has no figures of this checkpoint" in card
    assert "no real video" not in card
    assert "The licences of the data it was trained on, and of the weights it started from" in card
    for text in (card.encode(), output.read_bytes(), output.with_suffix(".json").read_bytes()):
        for place in (b"/secret", b"/srv", b"/data/", b"/a/b", str(tmp_path).encode()):
            assert place not in text


def test_a_checkpoint_before_the_end_has_none_of_the_last_figures(make_run: Any, tmp_path: Path) -> None:
    made = make_run()
    made.log_figures()
    main([f"--workdir={made.workdir}", f"--output={tmp_path / 'x.safetensors'}", f"--step={made.step - 1}"])
    assert load_weights(tmp_path / "x.safetensors").training["figures"] == {}


def test_too_large_a_file_is_not_written(make_run: Any, tmp_path: Path) -> None:
    made = make_run()
    output = tmp_path / "x.safetensors"
    size = count_params(made.config.model)
    limit = (3 * size) / 1e6  # between 2 and 4 bytes a parameter
    with pytest.raises(
        ConfigError, match=rf"would be {4 * size / 1e6:.1f}\d* MB, above the limit of {limit:g} MB"
    ):
        main([f"--workdir={made.workdir}", f"--output={output}", "--dtype=float32", f"--most_mb={limit}"])
    assert list(tmp_path.glob("x.*")) == []
    main([f"--workdir={made.workdir}", f"--output={output}", f"--most_mb={limit}"])
    assert 2 * size < output.stat().st_size < limit * 1e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output=x.safetensors"], "--workdir=RUN is missing"),
        (["--workdir=RUN", "--output=x.npz"], r"--output=x\.npz: must end in \.safetensors"),
        (["--workdir=RUN", "--output=x.safetensors", "--most_mb=0"], "--most_mb=0: must be positive"),
        (
            ["--workdir=RUN", "--output=x.safetensors", "--notes=none.txt"],
            r"--notes=none\.txt: cannot be read",
        ),
        (["--workdir=nowhere", "--output=x.safetensors"], "nowhere is not the workdir of a run"),
        (["--workdir=RUN", "--output=x.safetensors", "--dtype=float16"], "invalid choice: 'float16'"),
    ],
)
def test_wrong_options_are_said(make_run: Any, words: list[str], message: str) -> None:
    workdir = str(make_run().workdir)
    with pytest.raises(ConfigError, match=message):
        main([workdir.join(word.split("RUN")) if "RUN" in word else word for word in words])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/a/b/c.npz", "c.npz"),
        ("~/a/c", "c"),
        ("--workdir=/a/b", "--workdir=b"),
        ("python /x/y.py --path=/p/q,r=/s/t", "python y.py --path=q,r=t"),
        ("configs/tapnext.py:recipe=gpu", "configs/tapnext.py:recipe=gpu"),
        ("4/256 of a side", "4/256 of a side"),
    ],
)
def test_folders_are_left_out(text: str, wanted: str) -> None:
    assert without_folders({"x": [text, 1, None]}) == {"x": [wanted, 1, None]}


@pytest.mark.slow
def test_a_real_run_is_exported_and_trained_further(tmp_path: Path) -> None:
    """Two steps through the real command; the exported file opens as the run does, and starts another run."""
    workdir = tmp_path / "run"
    run(workdir, "--config.train.steps=2", "--config.optim.total=2", "--config.data.generated_held_out=2")
    output = tmp_path / "tiny.safetensors"
    main([f"--workdir={workdir}", f"--output={output}", "--dtype=float32"])
    model, params = open_model(output), flatten_names(load_params(workdir))
    assert model.config == open_model(workdir).config
    for name, value in flatten_names(model.params).items():
        np.testing.assert_array_equal(value, params[name], name)
    card = output.with_suffix(".md").read_text()
    assert "| model |" in card
    assert "| Lucas-Kanade |" in card
    assert str(tmp_path) not in card
    again = initial_params(frozen(f"init={output}"))
    assert flatten_names(again).keys() == params.keys()
