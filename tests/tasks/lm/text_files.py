"""Small data sets written in their real formats, for tests of sources and of training from them."""

import json
import sys
from pathlib import Path

import numpy as np

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(30):
            yield i, {"text": f"example {i} \\u2603 " * (i + 1), "n": i}
"""


def write_zarr2(path: Path, array: np.ndarray, chunks: tuple[int, int], compressor) -> None:
    """A zarr version 2 array written by its specification: JSON header and one file a chunk."""
    path.mkdir(parents=True)
    header = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunks,
        "dtype": array.dtype.str,
        "compressor": compressor and {k: v for k, v in compressor.get_config().items() if k != "checksum"},
        "fill_value": 0,
        "order": "C",
        "filters": None,
    }
    (path / ".zarray").write_text(json.dumps(header))
    for i in range(-(-array.shape[0] // chunks[0])):
        for j in range(-(-array.shape[1] // chunks[1])):
            chunk = np.zeros(chunks, array.dtype)
            part = array[i * chunks[0] : (i + 1) * chunks[0], j * chunks[1] : (j + 1) * chunks[1]]
            chunk[: part.shape[0], : part.shape[1]] = part
            (path / f"{i}.{j}").write_bytes(compressor.encode(chunk) if compressor else chunk.tobytes())


def make_tfds(folder: Path) -> Path:
    """A data set `tiny_text`, prepared as ArrayRecord by a builder in a package, as TFDS wants it.

    Returns:
      Its data_dir.
    """
    code, data = folder / "code", folder / "data"
    package = code / "tiny_text"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tiny_text_dataset_builder.py").write_text(BUILDER)
    (package / "CITATIONS.bib").write_text("")
    (package / "README.md").write_text("Tiny.")
    (package / "TAGS.txt").write_text("")
    sys.path.insert(0, str(code))
    try:
        from tiny_text.tiny_text_dataset_builder import Builder

        Builder(data_dir=data, file_format="array_record").download_and_prepare()
    finally:
        sys.path.remove(str(code))
        for name in [n for n in sys.modules if n.startswith("tiny_text")]:
            del sys.modules[name]
    return data
