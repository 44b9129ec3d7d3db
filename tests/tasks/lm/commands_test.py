"""`tasks.lm.eval` and `tasks.lm.generate` as commands: on an official checkpoint, a run, and bad input."""

import csv
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fox
from tasks.common.errors import ConfigError
from tasks.lm import eval as eval_command
from tasks.lm import generate_command
from tasks.lm.data import BytesTokenizer
from tasks.lm.train import train

TOKENIZER = BytesTokenizer()
WEIGHTS = np.linspace(-2.0, 2.0, TOKENIZER.vocab_size).astype(np.float32)
TEXTS = {"a.txt": "abcdefghijklmnop" * 2, "b.txt": "The quick brown fox jumps over.." * 2, "c.txt": "tiny"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOXTROT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, content in TEXTS.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """Official checkpoint of a model whose logits are WEIGHTS whatever it reads."""
    config = fox.FoxConfig.preset("fox_llama", "tiny", vocab_size=TOKENIZER.vocab_size)
    params = jax.tree.map(jnp.zeros_like, fox.init_params(config, jax.random.key(0)))
    params["embed"]["embedding"] = jnp.ones_like(params["embed"]["embedding"])
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    params["lm_head"]["kernel"] = jnp.zeros_like(params["lm_head"]["kernel"]).at[0].set(WEIGHTS)
    folder = tmp_path_factory.mktemp("official") / "unigram"
    fox.convert.save_official(folder, params, config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """Workdir of a short run of a tiny FoX."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    train(
        {
            "seed": 0,
            "model": {"vocab_size": 259, "hidden_size": 8, "num_layers": 1, "num_heads": 2},
            "runtime": {},
            "data": {"source": "text", "path": str(text), "validation_fraction": 0.5},
            "optim": {"peak_lr": 1e-3, "total": 2, "warmup": 1, "unit": "steps"},
            "train": {"steps": 2, "batch_size": 2, "seq_len": 8},
            "eval": {"documents": 0, "validation_batches": 0, "final_tokens": 0, "sample_tokens": 0},
            "mesh": {},
            "checkpoint": {},
            "log": {"progress": False},
        },
        workdir,
    )
    return workdir


def losses_of(text):
    return np.log(np.exp(WEIGHTS.astype(np.float64)).sum()) - WEIGHTS.astype(np.float64)[list(text.encode())]


def evaluate(*words):
    eval_command.main([str(word) for word in words])


def test_official_checkpoint_evaluates_to_hand_computed_figures(unigram, text, tmp_path):
    out = tmp_path / "out"
    evaluate(
        f"--checkpoint={unigram}",
        "--tokenizer=bytes",
        f"--data={text}",
        "--split=all",
        "--length=32",
        "--train_length=16",
        "--window=5",
        f"--output={out}",
    )
    long = [t[:32] for t in TEXTS.values() if len(t) >= 32]
    mean = np.mean([losses_of(t) for t in long], axis=0)
    rows = list(csv.DictReader((out / "per_position.csv").open()))
    np.testing.assert_allclose([float(r["loss"]) for r in rows], mean, rtol=1e-5)
    assert {r["documents"] for r in rows} == {"2"}
    smoothed = [mean[max(0, i - 2) : i + 3].mean() for i in range(32)]
    np.testing.assert_allclose([float(r["smoothed_loss"]) for r in rows], smoothed, rtol=1e-5)
    table = {
        int(r["length"]): float(r["perplexity"]) for r in csv.DictReader((out / "perplexity.csv").open())
    }
    assert table == pytest.approx({n: math.exp(mean[:n].mean()) for n in (32, 16)}, rel=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    (found,) = summary["models"].values()
    everything = np.concatenate([losses_of(t) for t in TEXTS.values()])
    size = sum(map(len, TEXTS.values()))
    end = np.log(np.exp(WEIGHTS.astype(np.float64)).sum()) - float(WEIGHTS[TOKENIZER.eos_id])
    bits = (everything.sum() + len(TEXTS) * end) / size / math.log(2)
    assert found["held_out"]["bytes"] == size
    assert found["held_out"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["pruning"]["documents"] == 2
    assert {p.name for p in out.iterdir()} >= {"loss_by_position.png", "acp.csv", "acp.png", "gates_00.png"}


@pytest.mark.slow
def test_short_documents_are_admitted_on_request(unigram, text, tmp_path):
    base = [f"--checkpoint={unigram}", "--tokenizer=bytes", f"--data={text}", "--split=all", "--length=64"]
    evaluate(*base, "--min_tokens=4", "--stats_documents=1", f"--output={tmp_path}")
    counts = [int(r["documents"]) for r in csv.DictReader((tmp_path / "per_position.csv").open())]
    assert counts == [3] * 4 + [2] * 28 + [1] * 32
    with pytest.raises(ConfigError, match="none of the 3 held-out documents has 65 tokens"):
        evaluate(*base[:-1], "--length=65", f"--output={tmp_path}")


@pytest.mark.slow
def test_runs_are_compared_in_one_figure(run, tmp_path, capsys):
    evaluate(
        f"--workdir={run}",
        f"--compare={run}",
        "--names=first,second",
        "--length=4",
        "--max_documents=1",
        f"--output={tmp_path}",
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["models"]) == ["first", "second"]
    first, second = summary["models"].values()
    assert first["perplexity"] == second["perplexity"]
    assert first["train_length"] == 8
    assert (tmp_path / "first" / "per_position.csv").read_bytes() == (
        tmp_path / "second" / "per_position.csv"
    ).read_bytes()
    assert "perplexity by length" in capsys.readouterr().out


@pytest.mark.slow  # a run is trained
def test_generation_from_a_run_repeats_with_its_seed(run, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("from a file ")
    words = [
        f"--workdir={run}",
        "--prompt=abc",
        f"--prompt_file={prompt}",
        "--max_new_tokens=6",
        "--ignore_eos",
    ]
    texts = []
    for seed in (3, 3, 4):
        generate_command.main([*words, f"--seed={seed}", "--num_samples=2"])
        out, err = capsys.readouterr()
        texts.append(out)
        assert "24 new tokens" in err
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("--- 1 of 4 ---\nabc")
    assert texts[0].count("from a file ") == 2


@pytest.mark.slow
def test_generation_from_an_official_checkpoint_is_greedy_by_hand(unigram, capsys):
    """The largest weight is that of the last id, which is the pad: it has no text."""
    words = [f"--checkpoint={unigram}", "--tokenizer=bytes", "--prompt=x", "--greedy", "--max_new_tokens=3"]
    generate_command.main(words)
    out, err = capsys.readouterr()
    assert out == "x\n"
    assert "3 new tokens" in err
    generate_command.main([*words, "--stop_ids=258"])
    assert "1 new tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --workdir=DIR"),
        (["--workdir=RUN", "--checkpoint=OFFICIAL"], "give one of --workdir=DIR"),
        (["--workdir=TEXT"], "has no config.json"),
        (["--checkpoint=/no/such"], "no such file or folder"),
        (["--checkpoint=OFFICIAL"], "holds no tokenizer.json"),
        (["--checkpoint=OFFICIAL", "--tokenizer=/no/such"], "no such file or folder, and not 'bytes'"),
        (["--checkpoint=OFFICIAL", "--tokenizer=TEXT"], "expected a .tiktoken file"),
        (["--checkpoint=OFFICIAL", "--tokenizer=bytes", "--step=3"], "--step belongs to --workdir"),
        (["--workdir=RUN", "--tokenizer=bytes"], "a workdir knows its tokenizer"),
        (["--workdir=RUN", "--step=77"], "no checkpoint of step 77"),
        (["--checkpoint=RUN", "--tokenizer=bytes"], "workdir of a run; give it as --workdir"),
    ],
)
@pytest.mark.parametrize("command", [eval_command.main, generate_command.main])
def test_wrong_models_are_refused_in_one_line(command, words, message, run, unigram, text):
    places = {"RUN": run, "OFFICIAL": unigram, "TEXT": text}
    for name, path in places.items():
        words = [word.replace(f"={name}", f"={path}") for word in words]
    if command is eval_command.main and "--step=77" in words:
        words.append("--length=4")
    with pytest.raises(Exception, match=message) as caught:
        command(words)
    assert "\n" not in str(caught.value)
    assert type(caught.value).__name__ in ("ConfigError", "CheckpointError")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--length=0", "--length must be at least 1"),
        ("--window=10", "--window must be an odd number"),
        ("--max_tokens=-1", "--max_tokens must be 0 or more"),
        ("--log_pruning_tolerance=0", "negative"),
        ("--names=a,b", "2 names for 1 models"),
        ("--data=/no/such", "no such folder, and not 'stdlib'"),
        ("--min_tokens=100", "min_tokens = 100"),
        ("--lenght=4", "did you mean '--length'"),
    ],
)
def test_wrong_eval_options_are_refused(run, word, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(f"--workdir={run}", word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--top_p=2", "top_p must be in"),
        ("--num_samples=0", "--num_samples must be at least 1"),
        ("--stop_ids=x", "give token ids"),
        ("--prompt_file=/no/such", "cannot be read"),
        ("--max_length=3", "max_length is 3"),
        ("--no_bos", "prompt 0 has no tokens"),
    ],
)
def test_wrong_generate_options_are_refused_before_anything_is_printed(run, word, message, capsys):
    with pytest.raises(ConfigError, match=message):
        generate_command.main([f"--workdir={run}", word])
    assert capsys.readouterr().out == ""


def test_texts_of_a_batch_print_in_order(capsys):
    printer = generate_command.Printer(["p0 ", "p1 ", "p2 "], sys.stdout)
    for row, piece in ((1, "one"), (0, "ze"), (2, "two"), (0, "ro")):
        printer.add(row, piece)
    printer.end(2)
    assert capsys.readouterr().out == "--- 1 of 3 ---\np0 zero"
    printer.end(0)
    assert capsys.readouterr().out == "\n--- 2 of 3 ---\np1 one"
    printer.add(1, "!")
    printer.end(1)
    assert capsys.readouterr().out == "!\n--- 3 of 3 ---\np2 two\n"
