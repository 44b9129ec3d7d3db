"""Finished runs side by side: their rows, their figures, and what cannot be compared."""

import json
import shutil
from pathlib import Path

import pytest

from tasks.common.errors import ConfigError
from tasks.common.writer import read_records
from tasks.lm import compare
from tasks.lm.perlength import from_csv, perplexity_by_length
from tests.integration import lm_runs

PNG = b"\x89PNG"
TEXT = "data=text,vocab=259,tokenizer=bytes"
EVALUATED = (
    "--config.eval.length=128",
    "--config.eval.documents=3",
    "--config.eval.validation_batches=1",
    "--config.eval.batch_size=2",
)


def train(workdir: Path, texts: Path, *options: str, arch: str = "fox_pro", seed: int = 0) -> list[dict]:
    file = "configs/fox.py" if arch.startswith("fox") else "configs/transformer.py"
    arguments = f"arch={arch},seed={seed},{TEXT},path={texts}"
    return lm_runs.run(workdir, *EVALUATED, "--config.train.steps=6", *options, config=file, args=arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fox, fox-exact, transformer and fox-1 (another seed, and not evaluated by position)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setenv("FOXTROT_CACHE", str(folder / "cache"))
        texts = lm_runs.write_texts(folder / "texts")
        measured = ("--config.eval.pruning_documents=1", "--config.eval.pruning_every=3")
        train(folder / "fox", texts, *measured)
        train(folder / "exact", texts, *measured, "--config.runtime.log_pruning_tolerance=none")
        train(folder / "transformer", texts, arch="transformer_llama")
        train(folder / "fox-1", texts, "--config.eval.documents=0", seed=1)
    return folder


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_rows_figures_and_what_pruning_changes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("fox", "exact", "transformer", "fox-1")
    results, output = tmp_path / "deep" / "r.json", tmp_path / "figures"
    compare.main([*(str(runs / n) for n in names), f"--output={output}", f"--results={results}"])
    rows = rows_of(results)
    assert [r["model"] for r in rows] == [
        "FoX (Pro)", "FoX (Pro), exact", "Transformer (LLaMA)", "FoX (Pro)"
    ]  # fmt: skip
    assert [r["seed"] for r in rows] == [0, 0, 0, 1]
    assert {tuple(r) for r in rows} == {tuple(rows[0])}  # the same columns, in one order
    records = read_records(runs / "fox")
    held_out = [r["validation/loss"] for r in records if "validation/loss" in r][-1]
    assert rows[0]["held-out loss"] == pytest.approx(held_out, rel=1e-4)
    assert rows[0]["tokens"] == 6 * 4 * 64
    mean, _ = from_csv((runs / "fox" / "evaluation" / "per_position.csv").read_text(encoding="utf-8"))
    assert rows[0]["ppl at 128"] == pytest.approx(perplexity_by_length(mean, [128])[128], rel=1e-4)
    assert rows[3]["ppl at 128"] is None
    assert rows[2]["pruned"] == "-"  # a Transformer has no pruning: None would read "not run"
    assert {p.name for p in output.iterdir()} == {
        "training.png", "loss_by_position.png", "pruning_fox.png", "pruning_exact.png", "acp_off.png"
    }  # fmt: skip
    assert all(p.read_bytes().startswith(PNG) for p in output.iterdir())
    assert "ACP on and off: training losses" in capsys.readouterr().out


@pytest.mark.slow
def test_only_runs_that_differ_in_nothing_else_show_what_pruning_changes(runs: Path) -> None:
    recorded = {name: compare.read_run(runs / name) for name in ("fox", "exact", "transformer", "fox-1")}
    pairs = compare.with_and_without_pruning(list(recorded.values()))
    assert [(a.workdir.name, b.workdir.name) for a, b in pairs] == [("fox", "exact")]
    twin = recorded["exact"]
    shifted = [{**r, "loss": r["loss"] + 0.5} if r["kind"] == "train" else r for r in twin.metrics]
    text = compare.describe_pruning_off(twin, twin._replace(metrics=shifted))
    assert "0.5 apart in the mean, 0.5 at most" in text


@pytest.mark.slow
def test_columns_that_no_run_has_are_left_out(runs: Path, tmp_path: Path) -> None:
    """And a commit is stated for those that recorded none, a command instead of their own."""
    folder = tmp_path / "bare"
    shutil.copytree(runs / "fox-1", folder, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"git": None}))
    options = [f"--output={tmp_path}", f"--results={tmp_path / 'r.json'}", "--commit=abc", "--command=how"]
    compare.main([str(folder), *options])
    (row,) = rows_of(tmp_path / "r.json")
    assert (row["commit"], row["command"]) == ("abc", "how")
    assert not {"pruned", "ppl at 128"} & row.keys()
    assert "pruned" not in compare.result_rows([compare.read_run(runs / "transformer")], ["alone"])[0]
    assert not (tmp_path / "loss_by_position.png").exists()


@pytest.mark.slow
def test_names_tell_runs_apart(runs: Path) -> None:
    fox, exact, other = (compare.read_run(runs / n) for n in ("fox", "exact", "fox-1"))
    assert compare.default_names([fox, exact]) == ["FoX (Pro)", "FoX (Pro), exact"]
    assert compare.default_names([fox, other]) == ["FoX (Pro), seed 0", "FoX (Pro), seed 1"]
    assert compare.default_names([fox, fox]) == ["fox", "fox"]


@pytest.mark.slow  # the runs it needs are trained
def test_what_cannot_be_compared_is_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"texts is not the workdir of a run: it has no config\.json"):
        compare.main([str(runs / "texts")])
    with pytest.raises(ConfigError, match="--names gives 1 names for 2 runs"):
        compare.main([str(runs / "fox"), str(runs / "exact"), "--names=one", f"--output={tmp_path}"])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "fox", unfinished, ignore=shutil.ignore_patterns("checkpoints"))
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(line for line in lines if "finished" not in line))
    with pytest.raises(ConfigError, match="unfinished: the run has not finished: its own command goes on"):
        compare.main([str(unfinished)])
