"""Sources in their real formats: the standard library, LongCrawl64 (zarr), TFDS."""

import pickle
import sys
import sysconfig
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import tensorstore

from tasks.common.data import Batches
from tasks.lm.data import DataConfig, PackedExamples, WindowExamples, build
from tasks.lm.data.longcrawl import LongCrawlExamples, ZarrDocuments
from tasks.lm.data.readers import DataFileError, TfdsReader
from tasks.lm.data.stdlib import stdlib_texts
from tests.tasks.lm.text_files import make_tfds, write_zarr2

DOCUMENTS, LENGTH, BATCH, T = 11, 64, 4, 16
GPT2_BOS = 50256


# The standard library


def test_standard_library_documents() -> None:
    texts = dict(stdlib_texts())
    root = Path(sysconfig.get_path("stdlib"))
    assert texts["json/decoder.py"].encode() == (root / "json" / "decoder.py").read_bytes()
    assert not any(n.startswith(("test/", "encodings/", "site-packages/")) or "/tests/" in n for n in texts)
    assert len(texts) > 300
    assert sum(map(len, texts.values())) > 5e6


def test_standard_library_split_covers_every_document_once() -> None:
    data = build(DataConfig(), 256, eval_length=4096)
    names = [d.name(i) for d in (data.train_documents, data.held_out_documents) for i in range(len(d))]
    assert sorted(names) == [n for n, _ in stdlib_texts()]
    held_out_share = len(data.held_out_documents) / len(names)
    assert 0.05 < held_out_share < 0.16
    assert isinstance(data.train, PackedExamples)
    assert 10 <= len(data.validation_documents) <= len(data.held_out_documents)
    assert data.validation_documents[0]["labels"].shape == (4096,)
    example = data.train[0]
    assert {k: (v.shape, v.dtype.name) for k, v in example.items()} == {
        "tokens": ((256,), "int32"),
        "labels": ((256,), "int32"),
        "reset": ((256,), "bool"),
        "loss_mask": ((256,), "bool"),
    }
    name = data.train_documents.name(0)
    assert data.tokenizer.decode(example["tokens"]) == dict(stdlib_texts())[name][:255]


def test_standard_library_with_a_bpe_trained_on_its_training_split(tmp_path: Path, monkeypatch) -> None:
    few = [(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 9) for i in range(40)]
    monkeypatch.setattr("tasks.lm.data.assemble.stdlib_texts", lambda: few)
    config = DataConfig(tokenizer="bpe", bpe_vocab_size=300, cache_dir=str(tmp_path))
    data = build(config, 32)
    assert data.tokenizer.vocab_size == 300
    assert data.train[0]["tokens"][0] == data.tokenizer.bos_id
    document = data.held_out_documents.read(0, 0, int(data.held_out_documents.lengths[0]))
    assert data.tokenizer.decode(document) == dict(few)[data.held_out_documents.name(0)]
    other = build(
        DataConfig(tokenizer="bpe", bpe_vocab_size=300, cache_dir=str(tmp_path), validation_fraction=0.3), 32
    )
    assert other.tokenizer.fingerprint != data.tokenizer.fingerprint  # no held-out text in the tokenizer


def test_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model.vocab_size=256 is smaller than the 259 ids of the tokenizer 'bytes'"
    ):
        build(DataConfig(), 64, vocab_size=256)


# LongCrawl64


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, GPT2_BOS, (DOCUMENTS, LENGTH)).astype(np.uint16)


@pytest.fixture
def longcrawl(tmp_path: Path, ids: np.ndarray) -> Path:
    blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
    write_zarr2(tmp_path / "lc" / "train.zarr", ids, (3, 20), blosc)
    write_zarr2(tmp_path / "lc" / "heldout.zarr", ids[:5] ^ 1, (2, 64), blosc)
    return tmp_path / "lc"


def config_for(path: Path, **more) -> DataConfig:
    return DataConfig(source="longcrawl64", path=str(path), tokenizer="gpt2", mode="windows", **more)


CODECS = {
    "blosc-lz4": numcodecs.Blosc(cname="lz4", shuffle=numcodecs.Blosc.BITSHUFFLE),
    "blosc-zstd": numcodecs.Blosc(cname="zstd", clevel=9, shuffle=numcodecs.Blosc.NOSHUFFLE),
    "blosclz": numcodecs.Blosc(cname="blosclz"),
    "zstd": numcodecs.Zstd(3),
    "gzip": numcodecs.GZip(5),
    "none": None,
}


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_codecs(codec: str, tmp_path: Path, ids: np.ndarray) -> None:
    write_zarr2(tmp_path / "a.zarr", ids, (4, 24), CODECS[codec])
    documents = ZarrDocuments(tmp_path / "a.zarr", 50257)
    assert documents.lengths.tolist() == [LENGTH] * DOCUMENTS
    np.testing.assert_array_equal(documents.rows(2, 9, 5, 61), ids[2:9, 5:61])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(documents)).read(10, 0, LENGTH), ids[10])
    assert documents.name(3) == "a.zarr[3]"


def test_zarr_version_3(tmp_path: Path, ids: np.ndarray) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a.zarr/"}}
    codecs = [{"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}}]
    spec["metadata"] = {"codecs": codecs}
    store = tensorstore.open(spec, create=True, dtype=tensorstore.uint16, shape=ids.shape).result()
    store.write(ids).result()
    np.testing.assert_array_equal(
        ZarrDocuments(tmp_path / "a.zarr", 50257).rows(0, DOCUMENTS, 0, LENGTH), ids
    )


def test_longcrawl_from_a_config(longcrawl: Path, ids: np.ndarray) -> None:
    data = build(config_for(longcrawl), T, batch_size=BATCH, eval_length=48, vocab_size=50257)
    assert data.train.ordered
    assert len(data.train) == (DOCUMENTS // BATCH) * BATCH * (LENGTH // T)
    # Batch 2 of 2 groups: group 0 again, its second window.
    np.testing.assert_array_equal(data.train[2 * BATCH + 3]["labels"], ids[3, T : 2 * T])
    assert data.train[2 * BATCH + 3]["tokens"].tolist() == [GPT2_BOS, *ids[3, T : 2 * T - 1]]
    # Every window of the documents that fill whole groups comes once an epoch.
    labels = np.stack([data.train[i]["labels"] for i in range(len(data.train))])
    expected = ids[:8].reshape(-1, T)
    assert sorted(map(tuple, labels.tolist())) == sorted(map(tuple, expected.tolist()))
    held_out = ids[:5] ^ 1
    np.testing.assert_array_equal(data.validation_documents[4]["labels"], held_out[4, :48])
    assert isinstance(data.validation, WindowExamples)
    np.testing.assert_array_equal(data.validation[5]["labels"], held_out[1, T : 2 * T])


def test_longcrawl_batches_are_shared_out_in_contiguous_parts(longcrawl: Path) -> None:
    data = build(config_for(longcrawl), T, batch_size=BATCH)
    assert isinstance(data.train, LongCrawlExamples)
    whole = data.train.batch(5)
    for name, value in whole.items():
        parts = [data.train.batch(5, r, 2)[name] for r in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), value)
        np.testing.assert_array_equal(value[1], data.train[5 * BATCH + 1][name])
    with pytest.raises(ValueError, match="batch_size=4 is not a multiple of process_count=3"):
        data.train.batch(0, 0, 3)
    with pytest.raises(IndexError, match="batch 8 of 8"):
        data.train.batch(8)


def test_longcrawl_reads_any_examples_together(longcrawl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build(config_for(longcrawl), T, batch_size=BATCH)
    indices = [6, 7, 8, 9, 10, 3, 2, 2, 31]  # crosses a batch border, goes back, repeats
    expected = [data.train[i] for i in indices]
    reads = []
    rows = ZarrDocuments.rows
    monkeypatch.setattr(ZarrDocuments, "rows", lambda *a: (reads.append(a[1:3]), rows(*a))[1])
    together = data.train.read(indices)
    for name, value in together.items():
        np.testing.assert_array_equal(value, np.stack([e[name] for e in expected]))
    assert [after - first for first, after in reads] == [2, 3, 1, 1, 1, 1]
    with pytest.raises(IndexError, match="example 32 of 32"):
        data.train.read([0, 32])


def test_global_batches_over_longcrawl_are_the_official_ones(longcrawl: Path) -> None:
    data = build(config_for(longcrawl), T, batch_size=BATCH)
    batches = Batches(data.train, BATCH, seed=3, order="sequential")
    for k in (0, 1, 5, 7):
        official = data.train.batch(k)
        for name, value in batches.rows(k, 0, BATCH).items():
            np.testing.assert_array_equal(value, official[name])
        half = batches.rows(k, 2, BATCH)
        np.testing.assert_array_equal(half["tokens"], official["tokens"][2:])


def test_longcrawl_misfits_are_refused(longcrawl: Path) -> None:
    with pytest.raises(ValueError, match="seq_len=24 does not divide the 64 tokens"):
        build(config_for(longcrawl), 24, batch_size=BATCH)
    with pytest.raises(ValueError, match=r"batch_size=12 must be 1..11"):
        build(config_for(longcrawl), T, batch_size=12)
    with pytest.raises(ValueError, match=r"needs the global batch size"):
        build(config_for(longcrawl), T)
    with pytest.raises(ValueError, match=r"set data.mode='windows'"):
        DataConfig(source="longcrawl64", path="x", tokenizer="gpt2")
    with pytest.raises(ValueError, match=r"set data.tokenizer='gpt2', not 'bytes'"):
        DataConfig(source="longcrawl64", path="x", mode="windows")
    with pytest.raises(DataFileError, match=r"nowhere: no such folder"):
        build(config_for(longcrawl / "nowhere"), T, batch_size=BATCH)
    with pytest.raises(DataFileError, match=r"validation_path: .*nowhere: no such folder"):
        build(config_for(longcrawl, validation_path=str(longcrawl / "nowhere")), T, batch_size=BATCH)


def test_incomplete_or_damaged_arrays_are_refused(longcrawl: Path) -> None:
    train = longcrawl / "train.zarr"
    chunk = (train / "0.1").read_bytes()
    (train / "0.1").unlink()  # zarr would read zeros here
    with pytest.raises(DataFileError, match=r"train\.zarr, documents 1\.\.1"):
        ZarrDocuments(train, 50257).read(1, 0, LENGTH)
    (train / "0.1").write_bytes(chunk[: len(chunk) // 2])
    with pytest.raises(DataFileError, match=r"train\.zarr, documents 1\.\.1"):
        ZarrDocuments(train, 50257).read(1, 0, LENGTH)
    (train / ".zarray").write_text("{")
    with pytest.raises(DataFileError, match=r"train\.zarr") as error:
        ZarrDocuments(train, 50257)
    assert "tensorstore_spec" not in str(error.value)
    (train / ".zarray").unlink()
    with pytest.raises(DataFileError, match="not a zarr array"):
        ZarrDocuments(train, 50257)


def test_zarr_arrays_of_something_else_are_refused(tmp_path: Path, ids: np.ndarray) -> None:
    write_zarr2(tmp_path / "f.zarr", ids.astype(np.float32), (4, 24), None)
    with pytest.raises(
        DataFileError, match=r"expected integer ids \(documents, tokens\), got float32 \(11, 64\)"
    ):
        ZarrDocuments(tmp_path / "f.zarr", 50257)


def test_longcrawl_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, ids: np.ndarray) -> None:
    ids[7, 30] = 50300
    write_zarr2(tmp_path / "train.zarr", ids, (4, 24), None)
    documents = ZarrDocuments(tmp_path / "train.zarr", 50257)
    documents.rows(4, 8, 0, 30)
    with pytest.raises(DataFileError, match=r"document 7: token id 50300 is beyond the vocabulary of 50257"):
        documents.rows(4, 8, 0, LENGTH)


# TFDS

TEXTS = {f"example {i} \u2603 " * (i + 1) for i in range(30)}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tfds(tmp_path_factory.mktemp("tfds"))


@pytest.mark.parametrize("by", ["name", "folder"])
def test_tfds_text(tfds_folder: Path, tmp_path: Path, by: str) -> None:
    path = tfds_folder if by == "name" else tfds_folder / "tiny_text" / "1.0.0"
    config = DataConfig(
        source="tfds", tfds_name="tiny_text" if by == "name" else "", path=str(path), cache_dir=str(tmp_path)
    )
    data = build(config, 32)
    both = (data.train_documents, data.held_out_documents)
    read = {data.tokenizer.decode(d.read(i, 0, int(n))) for d in both for i, n in enumerate(d.lengths)}
    assert read == TEXTS
    assert len(data.held_out_documents) >= 1
    assert data.train[0]["tokens"][0] == data.tokenizer.bos_id
    again = build(config, 32)  # from the shards in the cache
    np.testing.assert_array_equal(again.train[3]["labels"], data.train[3]["labels"])


def test_tfds_slices_of_splits(tfds_folder: Path) -> None:
    reader = TfdsReader("tiny_text", str(tfds_folder), split="train[:5]")
    (part,) = reader.plan()
    assert len(list(reader.read(part, pytest.fail))) == 5
    copy = pickle.loads(pickle.dumps(reader))
    assert list(copy.read(part, pytest.fail)) == list(reader.read(part, pytest.fail))
    assert copy.digest(part) == reader.digest(part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field": "body"}, r"no text in feature 'body' \(there is: n, text\)"),
        ({"field": "n"}, r"no text in feature 'n'"),
        ({"split": "test"}, "tfds:tiny_text:test"),
        ({"name": "no_such_data_set"}, "tfds:no_such_data_set:train"),
        ({"name": ""}, "there is no dataset_info.json"),
    ],
)
def test_tfds_misfits_are_named(tfds_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DataFileError, match=message):
        TfdsReader(**{"name": "tiny_text", "data_dir": str(tfds_folder), **arguments})


def test_tfds_missing_says_what_to_install(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'foxtrot\[tfds\]'"):
        TfdsReader("tiny_text", str(tfds_folder))


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "web"}, "data.source must be one of stdlib, text, longcrawl64, tfds, got 'web'"),
        ({"tokenizer": "gpt3"}, "data.tokenizer must be one of bytes, gpt2, hf, bpe"),
        ({"mode": "pack"}, "data.mode must be one of packed, windows"),
        ({"on_error": "ignore"}, "data.on_error must be one of skip, fail"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction must be in \[0, 1\)"),
        ({"cut": -1}, "data.cut must be a number of bytes"),
        ({"source": "text"}, "data.source='text' needs data.path"),
        ({"source": "tfds"}, "needs data.tfds_name"),
        ({"validation_path": "x"}, "validation_path has no meaning for data.source='stdlib'"),
        ({"tokenizer": "gpt2"}, r"needs data.tokenizer_path \(a .tiktoken file"),
        ({"tokenizer": "hf"}, r"needs data.tokenizer_path \(a tokenizer.json"),
    ],
)
def test_configurations_that_cannot_work_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_nothing_held_out_is_possible() -> None:
    data = build(DataConfig(validation_fraction=0.0, mode="windows"), 64)
    assert data.validation is None
    assert len(data.validation_documents) == 0
    assert isinstance(data.train, WindowExamples)


def test_a_given_held_out_folder_is_the_split(tmp_path: Path) -> None:
    """All of `path` is trained on, held-out documents come scattered, a text on both sides is refused."""
    for folder, texts in (("train", range(8)), ("held", range(10, 16))):
        (tmp_path / folder).mkdir()
        for i in texts:
            (tmp_path / folder / f"{i:02d}.txt").write_text(f"text number {i} " * (i + 1))
    config = DataConfig(
        source="text",
        path=str(tmp_path / "train"),
        validation_path=str(tmp_path / "held"),
        cache_dir=str(tmp_path / "cache"),
    )
    data = build(config, 64, eval_length=200)
    names = [data.held_out_documents.name(i) for i in range(6)]
    assert len(data.train_documents) == 8
    assert sorted(names) == [f"{i}.txt#0" for i in range(10, 16)] != names
    assert {data.train_documents.name(i)[:2] for i in range(8)} == {f"{i:02d}" for i in range(8)}
    lengths = data.held_out_documents.lengths
    assert data.validation_documents.indices.tolist() == np.flatnonzero(lengths >= 200).tolist()
    (tmp_path / "train" / "copy.txt").write_bytes((tmp_path / "held" / "12.txt").read_bytes())
    with pytest.raises(
        ValueError, match=r"1 document\(s\) of .*held are also in .*train, the first is 12.txt"
    ):
        build(config, 64)
