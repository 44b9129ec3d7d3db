"""LongCrawl64's official batch order and labels, read from a real blosc-compressed zarr array."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore

from tasks.lm.data.longcrawl import LongCrawlExamples, ZarrDocuments

GPT2_BOS = 50256
NAMES = {"tokens": "input_ids", "labels": "labels", "reset": "resets"}


@pytest.fixture
def golden(golden_file: Path) -> dict[str, np.ndarray]:
    with np.load(golden_file) as arrays:
        return dict(arrays)


@pytest.fixture
def examples(golden: dict[str, np.ndarray], tmp_path: Path) -> LongCrawlExamples:
    documents = golden["documents"]
    chunks = [max(n // 3, 1) for n in documents.shape]  # chunk borders fall inside batches and windows
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/train.zarr/"},
            "metadata": {
                "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1},
                "chunks": chunks,
            },
        },
        create=True,
        dtype=tensorstore.uint16,
        shape=documents.shape,
    ).result()
    store.write(documents).result()
    source = ZarrDocuments(tmp_path / "train.zarr", vocab_size=1 << 16)
    return LongCrawlExamples(source, int(golden["batch_len"]), int(golden["batch_size"]), bos_id=GPT2_BOS)


@pytest.mark.golden("data_order*.npz", room="fox")
def test_every_rank_gets_the_official_batches(
    golden: dict[str, np.ndarray], examples: LongCrawlExamples
) -> None:
    world = int(golden["world_size"])
    for rank in range(world):
        for i, batch in enumerate(golden["batch_ids"]):
            ours = examples.batch(int(batch), rank, world)
            for name, official in NAMES.items():
                np.testing.assert_array_equal(
                    ours[name], golden[f"{official}_rank{rank}"][i], f"{name} batch {batch}"
                )
            assert ours["loss_mask"].all()


@pytest.mark.golden("data_order*.npz", room="fox")
def test_examples_by_index_are_the_same_batches(
    golden: dict[str, np.ndarray], examples: LongCrawlExamples
) -> None:
    size, world = int(golden["batch_size"]), int(golden["world_size"])
    for i, batch in enumerate(golden["batch_ids"]):
        rows = [examples[int(batch) * size + r] for r in range(size)]
        for name, official in NAMES.items():
            whole = np.concatenate([golden[f"{official}_rank{rank}"][i] for rank in range(world)])
            np.testing.assert_array_equal(np.stack([r[name] for r in rows]), whole)


@pytest.mark.golden("data_order*.npz", room="fox")
def test_an_epoch_has_the_official_number_of_batches(
    golden: dict[str, np.ndarray], examples: LongCrawlExamples
) -> None:
    assert examples.num_batches == int(golden["num_batches"])
    assert len(examples) == examples.num_batches * int(golden["batch_size"])
    assert examples.ordered
