"""Folders of text into shards: real file formats, bad inputs, kill and resume, changed inputs."""

import gzip
import itertools
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tasks.lm.data import DataConfig, build
from tasks.lm.data import prepare as module
from tasks.lm.data import readers as readers_module
from tasks.lm.data.prepare import pieces, prepare
from tasks.lm.data.readers import DataFileError, FolderReader
from tasks.lm.data.shards import ShardDocuments, changed_inputs, read_manifest
from tasks.lm.data.tokenizers import BytesTokenizer, train_bpe

BYTES = BytesTokenizer()
ROOT = Path(__file__).resolve().parents[3]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def contents(documents: ShardDocuments) -> list[str]:
    return [BYTES.decode(documents.read(i, 0, int(n))) for i, n in enumerate(documents.lengths)]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of every kind that is read, and one that is not."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("plain text\n")
    (folder / "b.md").write_text("# na\u00efve \u2603\n")
    (folder / "c.jsonl").write_bytes(jsonl(["one", "two\nlines"]))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(["three"])))
    frames = zstandard.ZstdCompressor().compress(jsonl(["four"])) + zstandard.ZstdCompressor().compress(
        jsonl(["five"])
    )
    (folder / "e.jsonl.zst").write_bytes(frames)  # two frames, as `cat a.zst b.zst` makes
    (folder / "f.txt.xz").write_bytes(lzma.compress(b"six"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "sub" / "g.py").write_bytes(
        b"\xef\xbb\xbfseven = 7\r\n"
    )  # byte order mark and line ends of Windows
    return folder


ALL = [
    "plain text\n",
    "# na\u00efve \u2603\n",
    "one",
    "two\nlines",
    "three",
    "four",
    "five",
    "six",
    "seven = 7\r\n",
]


def test_every_format_is_read_in_path_order(folder: Path, tmp_path: Path) -> None:
    manifest = prepare(FolderReader(folder), BYTES, tmp_path / "out", workers=1)
    documents = ShardDocuments(tmp_path / "out", BYTES)
    assert contents(documents) == ALL
    assert manifest["documents"] == len(ALL)
    assert manifest["tokens"] == manifest["bytes"] == sum(len(t.encode()) for t in ALL)
    assert manifest["dtype"] == "uint16"
    assert manifest["max_id"] == 0xE2
    assert manifest["skipped"] == []
    assert manifest["tokenizer"]["fingerprint"] == BYTES.fingerprint
    assert documents.document_bytes.tolist() == [len(t.encode()) for t in ALL]
    assert documents.name(3) == "c.jsonl#1"
    assert documents.read(3, 4, 7).tolist() == list(b"lin")


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_do_not_depend_on_workers_and_documents_not_on_shards(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    prepare(FolderReader(folder), BYTES, tmp_path / "one", workers=1, shard_bytes=40)
    prepare(FolderReader(folder), BYTES, tmp_path / "two", workers=workers, shard_bytes=40)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    documents = ShardDocuments(tmp_path / "two", BYTES)
    assert len(documents.manifest["shards"]) > 3
    assert contents(documents) == ALL
    copy = pickle.loads(pickle.dumps(documents))
    assert contents(copy) == ALL


def test_large_vocabulary_takes_four_bytes(folder: Path, tmp_path: Path) -> None:
    class Wide(BytesTokenizer):
        vocab_size = 70000
        fingerprint = "wide"

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text) + 69000

    prepare(FolderReader(folder), Wide(), tmp_path / "out", workers=1)
    documents = ShardDocuments(tmp_path / "out", Wide())
    assert documents.manifest["dtype"] == "uint32"
    assert documents.read(0, 0, 2).tolist() == [69000 + ord("p"), 69000 + ord("l")]


def test_a_long_jsonl_is_read_in_byte_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i} " + "x" * (i % 37) for i in range(60)]
    (tmp_path / "long.jsonl").write_bytes(jsonl(texts))
    for step in (1, 50, 100, 333, 10**6):
        monkeypatch.setattr(readers_module, "_RANGE", step)
        reader = FolderReader(tmp_path / "long.jsonl")
        read = [t for part in reader.plan() for _, t in reader.read(part, pytest.fail)]
        assert read == texts, f"ranges of {step} bytes"


def test_field_and_cut(tmp_path: Path) -> None:
    lines = "".join(f"line {i}\n" for i in range(10))
    (tmp_path / "a.jsonl").write_bytes(jsonl([lines], field="body"))
    prepare(FolderReader(tmp_path / "a.jsonl", "body"), BYTES, tmp_path / "out", workers=1, cut=20)
    assert contents(ShardDocuments(tmp_path / "out", BYTES)) == [
        f"line {i}\nline {i + 1}\n" for i in range(0, 10, 2)
    ]
    assert list(pieces("a long line\nb\n", 4)) == ["a long line\n", "b\n"]
    assert list(pieces("\u2603\u2603", 6)) == ["\u2603\u2603"]


def cut_in_half(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


NOISE = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes().decode()
BAD = {
    "empty.txt": (lambda p: p.write_bytes(b""), "empty"),
    "empty.jsonl": (lambda p: p.write_bytes(b""), "empty"),
    "blank.txt": (lambda p: p.write_bytes(b" \n\n"), "empty"),
    "latin.txt": (lambda p: p.write_bytes("caf\u00e9".encode("latin-1")), "not UTF-8 text: byte 3 is 0xe9"),
    "half.jsonl.gz": (
        lambda p: cut_in_half(p, gzip.compress(jsonl([NOISE, "x"]))),
        "truncated: the gzip data",
    ),
    "half.txt.xz": (lambda p: cut_in_half(p, lzma.compress(NOISE.encode())), "truncated: the xz"),
    "fake.txt.xz": (lambda p: p.write_bytes(b"not xz"), "damaged xz data"),
    "half.txt.zst": (
        lambda p: cut_in_half(p, zstandard.compress(NOISE.encode())),
        "truncated: the zstandard",
    ),
    "half.jsonl.zst": (
        lambda p: cut_in_half(p, zstandard.compress(jsonl([NOISE]))),
        "truncated: the zstandard",
    ),
    "fake.txt.gz": (lambda p: p.write_bytes(b"not gzip"), "damaged gzip data"),
    "fake.txt.zst": (lambda p: p.write_bytes(b"not zstd"), "damaged zstandard data"),
    "cut.jsonl": (lambda p: p.write_bytes(jsonl(["whole", "cut off here"])[:-8]), "line 2: not JSON"),
    "field.jsonl": (
        lambda p: p.write_bytes(jsonl(["x"], "body")),
        r"line 1: no text in field 'text' \(there is: body, id",
    ),
    "list.jsonl": (lambda p: p.write_bytes(b"[1]\n"), r"no text in field 'text' \(there is: list\)"),
    "half.jsonl": (
        lambda p: p.write_bytes(b'{"text": "ab\\ud83d"}\n'),
        "character 2 of the text is half a surrogate",
    ),
    "bytes.jsonl": (lambda p: p.write_bytes(b'{"text": "\xff"}\n'), "not UTF-8 at byte 10 of the line"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_skipped_or_refused(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("good")
    (tmp_path / "in" / "z.txt").write_text("also good")
    make(tmp_path / "in" / name)
    with pytest.raises(DataFileError, match=message) as error:
        prepare(FolderReader(tmp_path / "in"), BYTES, tmp_path / "out", workers=1, on_error="fail")
    assert name in str(error.value)
    manifest = prepare(FolderReader(tmp_path / "in"), BYTES, tmp_path / "out", workers=1)
    (skipped,) = manifest["skipped"]
    assert name in skipped["name"]
    read = contents(ShardDocuments(tmp_path / "out", BYTES))
    assert read == (["good", "whole", "also good"] if name == "cut.jsonl" else ["good", "also good"])


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress])
def test_documents_before_a_truncation_are_taken_back(tmp_path: Path, compress) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("good")
    (tmp_path / "in" / "z.txt").write_text("also good")
    long = [NOISE * 500, "second", NOISE[::-1] * 500]  # several read chunks: the first documents arrive whole
    ending = {gzip.compress: "gz", lzma.compress: "xz"}.get(compress, "zst")
    path = tmp_path / "in" / f"half.jsonl.{ending}"
    content = compress(jsonl([*long, *(NOISE[i:] for i in range(200))]))
    path.write_bytes(content[:-20])
    reader = FolderReader(tmp_path / "in")
    parts = reader.read(reader.plan()[1], pytest.fail)
    assert [text for _, text in itertools.islice(parts, 2)] == long[:2]
    with pytest.raises(DataFileError, match="truncated"):
        list(parts)
    prepare(reader, BYTES, tmp_path / "out", workers=1)
    assert contents(ShardDocuments(tmp_path / "out", BYTES)) == ["good", "also good"]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataFileError, match=r"in: no files ending in \.txt"):
        prepare(FolderReader(tmp_path / "in"), BYTES, tmp_path / "out")
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataFileError, match=r"no document could be read \(.*a\.txt: not UTF-8"):
        prepare(FolderReader(tmp_path / "in"), BYTES, tmp_path / "out", workers=1)
    with pytest.raises(DataFileError, match="no such file or folder"):
        FolderReader(tmp_path / "nowhere")


def test_only_what_changed_is_redone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prepare(FolderReader(folder), BYTES, out, workers=1, shard_bytes=1)
    made = []
    make_shard = module.make_shard
    monkeypatch.setattr(
        module, "make_shard", lambda job, n, parts: made.append(parts[0].path) or make_shard(job, n, parts)
    )
    prepare(FolderReader(folder), BYTES, out, workers=1, shard_bytes=1)
    assert made == []
    (folder / "c.jsonl").write_bytes(jsonl(["other"]))
    prepare(FolderReader(folder), BYTES, out, workers=1, shard_bytes=1)
    assert made == ["c.jsonl"]
    (out / "shard-00000.tokens").write_bytes(b"\0" * (out / "shard-00000.tokens").stat().st_size)
    prepare(FolderReader(folder), BYTES, out, workers=1, shard_bytes=1)
    assert made == ["c.jsonl", "a.txt"]
    (folder / "sub" / "g.py").unlink()
    prepare(FolderReader(folder), BYTES, out, workers=1, shard_bytes=1)
    assert contents(ShardDocuments(out, BYTES)) == [*ALL[:2], "other", *ALL[4:8]]
    assert len(list(out.glob("shard-*.tokens"))) == 6  # the last one of before is gone


def test_changed_inputs_are_noticed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(FolderReader(folder), BYTES, out, workers=1)
    assert changed_inputs(manifest) is None
    os.utime(folder / "a.txt")  # a new time alone is no change
    assert changed_inputs(manifest) is None
    (folder / "a.txt").write_text("plain TEXT\n")
    assert changed_inputs(manifest) == "a.txt has other content"
    (folder / "new.txt").write_text("new")
    assert changed_inputs(manifest) == "new.txt is new or longer"
    with pytest.raises(
        DataFileError, match=r"has changed since it was prepared: new.txt is new.*allow_changed_inputs"
    ):
        ShardDocuments(out, BYTES)
    assert len(ShardDocuments(out, BYTES, allow_changed_inputs=True)) == len(ALL)
    (folder / "new.txt").unlink()
    (folder / "b.md").unlink()
    assert changed_inputs(manifest) == "b.md is gone or shorter"
    folder.rename(tmp_path / "elsewhere")  # shards stand on their own
    assert changed_inputs(manifest) is None


def test_shards_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    bpe = train_bpe(ALL, 270, tmp_path / "bpe.json")
    prepare(FolderReader(folder), bpe, tmp_path / "out", workers=1)
    with pytest.raises(DataFileError, match=r"made with tokenizer 'hf' \(270 ids.*has 'bytes' \(259 ids"):
        ShardDocuments(tmp_path / "out", BYTES)
    config = DataConfig(
        source="text", path=str(tmp_path / "out"), tokenizer="hf", tokenizer_path=str(tmp_path / "bpe.json")
    )
    with pytest.raises(ValueError, match=r"model.vocab_size=260 is smaller than the 270 ids"):
        build(config, 16, vocab_size=260)
    data = build(config, 16, vocab_size=270)
    text = "".join(data.tokenizer.decode(data.train[i]["tokens"]) for i in range(len(data.train)))
    assert "plain text" in text or "plain text" in data.tokenizer.decode(data.validation[0]["tokens"])


def test_ids_beyond_the_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    prepare(FolderReader(folder), BYTES, tmp_path / "out", workers=1)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"max_id": 226', '"max_id": 300'))
    with pytest.raises(DataFileError, match="holds token id 300, but the vocabulary has 259"):
        ShardDocuments(tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "preparing it has not finished"),
        (lambda f: (f / "manifest.json").write_text('{"format": '), r"manifest\.json: damaged"),
        (lambda f: (f / "manifest.json").write_text("{}"), "not a manifest of foxtrot-text-shards"),
        (
            lambda f: (f / "shard-00000.tokens").write_bytes(b"\0"),
            r"shard-00000\.tokens: missing or not \d+ bytes",
        ),
        (lambda f: (f / "shard-00000.tokens").unlink(), r"shard-00000\.tokens: missing"),
        (lambda f: (f / "shard-00000.index").write_bytes(b""), r"shard-00000\.index: damaged"),
        (lambda f: (f / "shard-00000.index").write_bytes(b"\x93NUMPY junk"), r"shard-00000\.index: damaged"),
    ],
)
def test_damaged_shards_are_named(folder: Path, tmp_path: Path, damage, message: str) -> None:
    out = tmp_path / "out"
    prepare(FolderReader(folder), BYTES, out, workers=1)
    before = shard_bytes(out)
    damage(out)
    with pytest.raises(DataFileError, match=message):
        ShardDocuments(out, BYTES)
    prepare(FolderReader(folder), BYTES, out, workers=1)  # what the message says to do
    assert shard_bytes(out) == before


def test_flipped_bytes_are_found_by_verify(folder: Path, tmp_path: Path) -> None:
    prepare(FolderReader(folder), BYTES, tmp_path / "out", workers=1)
    path = tmp_path / "out" / "shard-00000.tokens"
    data = bytearray(path.read_bytes())
    documents = ShardDocuments(tmp_path / "out", BYTES)
    documents.verify()
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=r"shard-00000\.tokens: damaged \(checksum"):
        documents.verify()


def test_a_folder_without_shards_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="not a folder of shards; make one by"):
        read_manifest(tmp_path)


def test_raw_folder_is_tokenised_on_the_fly_once(folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    (folder / "bad.txt").write_bytes(b"\xff")
    config = DataConfig(
        source="text", path=str(folder), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3
    )
    first = build(config, 8)
    assert "bad.txt: not UTF-8 text: byte 0 is 0xff" in caplog.text
    monkeypatch.setattr(module, "make_shard", None)
    again = build(config, 8)
    assert len(first.train) == len(again.train)
    np.testing.assert_array_equal(first.train[0]["tokens"], again.train[0]["tokens"])
    names = {d.name(i) for d in (first.train_documents, first.held_out_documents) for i in range(len(d))}
    assert len(names) == len(ALL)


def _shards_done(out: Path) -> int:
    return len(list(out.glob("shard-*.json")))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_time_it_resumes_to_the_same_bytes(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        words = generator.integers(0, 10**6, 4000)
        (folder / f"{i:02d}.jsonl.gz").write_bytes(
            gzip.compress(jsonl([" ".join(map(str, w)) for w in np.split(words, 20)]), mtime=0)
        )
    bpe = tmp_path / "bpe.json"
    train_bpe([" ".join(map(str, range(3000)))], 400, bpe)
    options = ["--tokenizer=hf", f"--tokenizer-path={bpe}", f"--workers={workers}", "--shard-bytes=1"]

    def command(out: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "tasks.lm.data",
            "prepare",
            f"--input={folder}",
            f"--output={out}",
            *options,
        ]

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(undisturbed), cwd=ROOT, check=True, capture_output=True, timeout=120)
    seen = []
    for target in (1, 12, 28) if workers == 1 else (1, 20):
        process = subprocess.Popen(
            command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _shards_done(killed) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(_shards_done(killed))
        assert not (killed / "manifest.json").exists(), "the kill came too late to test anything"
    assert 1 <= seen[0] < seen[-1] < 40
    done = subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    assert "were done by an earlier run" in done.stderr
    assert shard_bytes(killed) == shard_bytes(undisturbed)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("text " * 200_000)
    command = [
        sys.executable,
        "-m",
        "tasks.lm.data",
        "prepare",
        f"--input={folder}",
        f"--output={tmp_path / 'out'}",
    ]
    process = subprocess.Popen(
        [*command, "--workers=2", "--shard-bytes=1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and _shards_done(tmp_path / "out") < 2:
        time.sleep(0.005)
    process.kill()
    # The workers hold the other end of the pipe: it closes when the last of them is gone.
    process.communicate(timeout=120)
