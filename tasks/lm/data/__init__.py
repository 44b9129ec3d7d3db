"""Text for language models: sources, tokenizers, shards, packing. See the README beside this file."""

from tasks.lm.data.assemble import LMData, build, make_tokenizer
from tasks.lm.data.config import DataConfig
from tasks.lm.data.documents import Documents
from tasks.lm.data.packing import DocumentStarts, Examples, PackedExamples, WindowExamples
from tasks.lm.data.tokenizers import BytesTokenizer, Tokenizer

__all__ = [
    "BytesTokenizer",
    "DataConfig",
    "DocumentStarts",
    "Documents",
    "Examples",
    "LMData",
    "PackedExamples",
    "Tokenizer",
    "WindowExamples",
    "build",
    "make_tokenizer",
]
