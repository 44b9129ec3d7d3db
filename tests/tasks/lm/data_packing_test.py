"""Packing and windows: index arithmetic against naive loops over all documents."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.lm.data.documents import FlatDocuments, held_out, scattered_order, split
from tasks.lm.data.packing import DocumentStarts, PackedExamples, WindowExamples

BOS, EOS, PAD = 1000, 1001, 1002
IDS = {"bos_id": BOS, "pad_id": PAD}
lengths_strategy = st.lists(st.integers(0, 23), min_size=1, max_size=12)


def documents_of(lengths: list[int]) -> FlatDocuments:
    """Documents whose ids are all different, so that any misplaced token shows."""
    ids = np.arange(sum(lengths), dtype=np.int32)
    cuts = np.cumsum(lengths)[:-1]
    return FlatDocuments(np.split(ids, cuts), [f"doc{i}" for i in range(len(lengths))])


def naive_rows(documents: FlatDocuments, seq_len: int) -> list[dict[str, np.ndarray]]:
    """The stream written out token by token, padded and cut."""
    stream: list[tuple[int, int, bool, bool]] = []
    for i, n in enumerate(documents.lengths):
        ids = documents.read(i, 0, int(n)).tolist()
        for position, (token, label) in enumerate(zip([BOS, *ids], [*ids, EOS], strict=True)):
            stream.append((token, label, position == 0, True))
    first_pad = True
    while len(stream) % seq_len:
        stream.append((PAD, PAD, first_pad, False))
        first_pad = False
    rows = []
    for start in range(0, len(stream), seq_len):
        tokens, labels, reset, mask = zip(*stream[start : start + seq_len], strict=True)
        rows.append(
            {
                "tokens": np.array(tokens, np.int32),
                "labels": np.array(labels, np.int32),
                "reset": np.array([True, *reset[1:]]),
                "loss_mask": np.array(mask),
            }
        )
    return rows


@given(lengths=lengths_strategy, seq_len=st.integers(1, 40))
def test_packed_rows_are_the_naive_concatenation(lengths: list[int], seq_len: int) -> None:
    documents = documents_of(lengths)
    packed = PackedExamples(documents, seq_len, eos_id=EOS, **IDS)
    expected = naive_rows(documents, seq_len)
    assert len(packed) == len(expected)
    for i in np.random.default_rng(0).permutation(len(packed)):  # any order: nothing is carried between reads
        row = packed[int(i)]
        assert row.keys() == expected[i].keys()
        for name, value in expected[i].items():
            assert row[name].dtype == value.dtype
            np.testing.assert_array_equal(row[name], value, f"{name} of row {i}")


@given(lengths=lengths_strategy.filter(any), seq_len=st.integers(1, 40))
def test_windows_are_every_documents_slices_shifted_by_one(lengths: list[int], seq_len: int) -> None:
    documents = documents_of(lengths)
    windows = WindowExamples(documents, seq_len, **IDS)
    expected = []
    for i, n in enumerate(lengths):
        ids = documents.read(i, 0, n).tolist()
        expected += [ids[s : s + seq_len] for s in range(0, n, seq_len)]
    assert len(windows) == len(expected)
    for i, window in enumerate(expected):
        pad = [PAD] * (seq_len - len(window))
        row = windows[i]
        assert row["labels"].tolist() == window + pad
        assert row["tokens"].tolist() == [BOS, *window[:-1], *pad]
        assert row["loss_mask"].tolist() == [True] * len(window) + [False] * len(pad)
        assert row["reset"].tolist() == [j in (0, len(window)) for j in range(seq_len)]


def test_every_token_is_predicted_exactly_once_in_both_modes() -> None:
    documents = documents_of([5, 0, 17, 1, 8])
    packed = PackedExamples(documents, 7, eos_id=EOS, **IDS)
    seen = np.concatenate([e["labels"][e["loss_mask"]] for e in map(packed.__getitem__, range(len(packed)))])
    assert sorted(seen.tolist()) == sorted([*range(31), *[EOS] * 5])
    windows = WindowExamples(documents, 7, **IDS)
    seen = np.concatenate(
        [e["labels"][e["loss_mask"]] for e in map(windows.__getitem__, range(len(windows)))]
    )
    assert seen.tolist() == list(range(31))


def test_validation_documents_are_the_long_ones_cut_to_length() -> None:
    documents = documents_of([5, 12, 10, 9])
    whole = DocumentStarts(documents, 10, **IDS)
    assert whole.indices.tolist() == [1, 2]
    assert whole[0]["labels"].tolist() == list(range(5, 15))
    assert whole[0]["tokens"].tolist() == [BOS, *range(5, 14)]
    assert whole[1]["loss_mask"].all()
    assert whole[1]["reset"].tolist() == [True] + [False] * 9
    assert len(DocumentStarts(documents, 13, **IDS)) == 0


def test_shorter_documents_are_padded_where_they_are_admitted() -> None:
    starts = DocumentStarts(documents_of([5, 12, 3]), 8, min_tokens=5, **IDS)
    assert starts.indices.tolist() == [0, 1]
    assert starts[0]["labels"].tolist() == [*range(5), PAD, PAD, PAD]
    assert starts[0]["loss_mask"].tolist() == [True] * 5 + [False] * 3
    assert starts[1]["loss_mask"].all()


@pytest.mark.parametrize(
    ("length", "least", "message"),
    [(0, None, "length = 0"), (4, 5, "min_tokens = 5"), (4, 0, "min_tokens = 0")],
)
def test_lengths_that_make_no_sense_are_refused(length: int, least: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentStarts(documents_of([6, 3]), length, min_tokens=least, **IDS)


def test_examples_survive_the_way_to_a_worker_process() -> None:
    packed = PackedExamples(documents_of([5, 12, 10]), 8, eos_id=EOS, **IDS)
    copy = pickle.loads(pickle.dumps(packed))
    np.testing.assert_array_equal(copy[1]["tokens"], packed[1]["tokens"])


def test_a_row_of_a_large_source_reads_only_its_own_documents() -> None:
    documents = documents_of([3] * 1000)
    reads = []
    read = documents.read
    documents.read = lambda *a: (reads.append(a), read(*a))[1]  # type: ignore[method-assign]
    packed = PackedExamples(documents, 16, eos_id=EOS, **IDS)
    assert reads == []
    assert packed[100]["tokens"][0] == BOS
    assert len(reads) == 4


def test_indices_outside_are_refused_and_negative_ones_count_from_the_end() -> None:
    packed = PackedExamples(documents_of([5, 12, 10]), 8, eos_id=EOS, **IDS)
    np.testing.assert_array_equal(packed[-1]["tokens"], packed[len(packed) - 1]["tokens"])
    with pytest.raises(IndexError, match="example 4 of 4"):
        packed[4]


def test_nothing_to_pack_is_said() -> None:
    with pytest.raises(ValueError, match="no documents"):
        PackedExamples(FlatDocuments([], []), 8, eos_id=EOS, **IDS)
    with pytest.raises(ValueError, match="all documents are empty"):
        WindowExamples(documents_of([0, 0]), 8, **IDS)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        PackedExamples(documents_of([3]), 0, eos_id=EOS, **IDS)


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=30, unique=True),
    fraction=st.floats(0.01, 0.6),
    order=st.randoms(use_true_random=False),
)
def test_the_split_depends_on_a_documents_hash_alone(hashes: list[int], fraction: float, order) -> None:
    array = np.array(hashes, np.uint64)
    try:
        out = held_out(array, fraction)
    except ValueError:
        assert all(h < fraction * 2**64 * (1 + 1e-9) for h in hashes)
        return
    assert 1 <= out.sum() < len(hashes)
    shuffled = list(range(len(hashes)))
    order.shuffle(shuffled)
    np.testing.assert_array_equal(held_out(array[shuffled], fraction), out[shuffled])
    # A document added that is held out itself moves no other one, once any is below the line.
    if (array < np.uint64(int(fraction * 2**64))).any():
        np.testing.assert_array_equal(held_out(np.append(array, np.uint64(0)), fraction)[:-1], out)


def test_copies_of_a_document_stay_on_one_side() -> None:
    out = held_out(np.array([7, 2**63, 7, 2**62], np.uint64), 0.001)
    assert out.tolist() == [True, False, True, False]


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"none is left to train on.*cut=65536"):
        held_out(np.array([5], np.uint64), 0.1)
    assert held_out(np.array([5], np.uint64), 0.0).tolist() == [False]
    with pytest.raises(ValueError, match=r"validation_fraction must be in \[0, 1\), got 1.0"):
        held_out(np.array([5], np.uint64), 1.0)


def test_split_keeps_every_document_once_and_scatters_the_training_ones() -> None:
    documents = documents_of([4] * 50)
    hashes = np.arange(50, dtype=np.uint64) * np.uint64(2**64 // 50 + 1)
    train, out = split(documents, hashes, 0.19)
    names = [train.name(i) for i in range(len(train))]
    assert [out.name(i) for i in range(len(out))] == [f"doc{i}" for i in range(10)]
    assert sorted(names) == sorted(f"doc{i}" for i in range(10, 50))
    assert names != sorted(names, key=lambda n: int(n[3:]))
    np.testing.assert_array_equal(train.read(3, 1, 3), np.arange(1, 3) + 4 * int(names[3][3:]))


def test_the_scattered_order_is_pinned() -> None:
    """Changing it would silently change every run's data order."""
    assert scattered_order(8).tolist() == sorted(range(8), key=splitmix64)


def splitmix64(index: int) -> int:
    mask = 2**64 - 1
    z = (index + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)
