"""Every source of text and every tokenizer trains through the real command, from real file formats."""

import base64
import gzip
import json
import math
import shutil
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.integration.lm_runs import EVALUATED, document, held_out, losses, run, write_texts
from tests.tasks.lm.text_files import make_tfds, write_zarr2

TEXTS = [document(seed) for seed in range(24)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOXTROT_CACHE", str(tmp_path / "cache"))


def _check(records: list[dict], vocab: int) -> None:
    found = losses(records)
    assert len(found) == 20
    assert all(map(math.isfinite, found))
    assert found[0] == pytest.approx(math.log(vocab), abs=0.15)
    assert found[-1] < found[0] - 0.3


@pytest.mark.slow
def test_jsonl_zst_prepared_by_the_command(tmp_path: Path) -> None:
    """`tasks.lm.data prepare`, then training from its shards."""
    from tasks.lm.data.__main__ import main

    source = tmp_path / "texts"
    source.mkdir()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    (source / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    main(["prepare", f"--input={source}", f"--output={tmp_path / 'shards'}", "--field=body"])
    _check(run(tmp_path / "run", args=f"data=text,path={tmp_path / 'shards'},vocab=259"), 259)


@pytest.mark.slow
def test_tokenizer_json(tmp_path: Path) -> None:
    """A Hugging Face tokenizer.json over raw text files, tokenised on the fly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    args = (
        f"data=text,path={write_texts(tmp_path / 'texts')},tokenizer=hf,"
        f"tokenizer_path={tmp_path / 'tokenizer.json'},vocab=300"
    )
    _check(run(tmp_path / "run", args=args), 300)


def _rank_file(path: Path) -> None:
    """A .tiktoken rank file with the ids of GPT-2's layout: bytes first, then merges, up to 50256 entries."""
    ranks = [bytes([b]) for b in range(256)]
    seen = set(ranks)
    for a in range(256):
        for b in range(256):
            if len(ranks) < 50256 and (pair := bytes([a, b])) not in seen:
                ranks.append(pair)
                seen.add(pair)
    path.write_text("".join(f"{base64.b64encode(r).decode()} {i}\n" for i, r in enumerate(ranks)))


@pytest.mark.slow
def test_gpt2_rank_file(tmp_path: Path) -> None:
    """Vocabulary of the paper's size from a local rank file."""
    _rank_file(tmp_path / "gpt2.tiktoken")
    args = (
        f"data=text,path={write_texts(tmp_path / 'texts')},tokenizer=gpt2,"
        f"tokenizer_path={tmp_path / 'gpt2.tiktoken'},vocab=50257"
    )
    _check(run(tmp_path / "run", args=args), 50257)


@pytest.mark.slow
def test_longcrawl64(tmp_path: Path) -> None:
    """Blosc zarr in the official batch order; its held-out array is what validation sees."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (24, 256)).astype(np.uint16)
    blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
    (tmp_path / "data").mkdir()
    write_zarr2(tmp_path / "data" / "train.zarr", tokens[:20], (4, 64), blosc)
    write_zarr2(tmp_path / "data" / "heldout.zarr", tokens[20:], (4, 64), blosc)
    records = run(tmp_path / "run", *EVALUATED, args=f"data=longcrawl64,path={tmp_path / 'data'}")
    _check(records, 50257)
    assert held_out(records)["loss"] < math.log(50257) - 0.3
    assert (tmp_path / "run" / "evaluation" / "per_position.csv").is_file()


def test_tfds(tmp_path: Path) -> None:
    """A Text feature of a TFDS data set in ArrayRecord files, read without TensorFlow."""
    args = f"data=tfds,path={make_tfds(tmp_path / 'tfds')},vocab=259"
    _check(run(tmp_path / "run", "--config.data.tfds_name=tiny_text", args=args), 259)


@pytest.mark.slow
def test_embedded_text(tmp_path: Path) -> None:
    """The default source, with a BPE trained on the spot, all evaluations and samples."""
    options = ("--config.data.bpe_vocab_size=300", *EVALUATED)
    records = run(tmp_path / "run", *options, args="data=stdlib,vocab=300")
    _check(records, 300)
    figures = held_out(records, "held_out")
    assert 1.2 < figures["trigram_nats_per_byte"] < figures["bigram_nats_per_byte"]
    assert figures["bigram_nats_per_byte"] < figures["unigram_nats_per_byte"] < 3.5
    assert list((tmp_path / "run" / "samples").glob("step_*.txt"))
    for picture in ("loss.png", "evaluation/loss_by_position.png"):
        assert (tmp_path / "run" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_gzipped_folder_of_files(tmp_path: Path) -> None:
    """Plain, gzipped and damaged text side by side: what cannot be read is skipped, the rest trains."""
    folder = write_texts(tmp_path / "texts")
    (folder / "one.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 200)[:-20])
    _check(run(tmp_path / "run", args=f"data=text,path={folder},vocab=259"), 259)


def test_a_finished_run_says_so_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FOXTROT_CACHE", str(tmp_path / "cache"))
    folder = write_texts(tmp_path / "texts")
    options = ("--config.train.steps=1", "--config.log.progress=true")
    first = run(tmp_path / "run", *options, args=f"data=text,path={folder},vocab=259")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert run(tmp_path / "run", *options, args=f"data=text,path={folder},vocab=259") == first
    assert f"finished: {tmp_path / 'run'} has all 1 steps" in capsys.readouterr().out
