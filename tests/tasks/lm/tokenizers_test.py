"""Tokenizers on tiny files in their real formats."""

import base64
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tasks.lm.data import tokenizers as ours
from tasks.lm.data.tokenizers import (
    BytesTokenizer,
    GPT2Tokenizer,
    HFTokenizer,
    JsonEscaped,
    PretokenizedGPT2,
    cached_bpe,
    train_bpe,
)

# Merges in order of rank: "he", "ll", "hell", "hello", " w". GPT-2 writes the space as U+0120.
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w")]
TEXT = "hello world\n\tna\u00efve \u2603 hello"


def gpt2_symbols() -> list[str]:
    """GPT-2's stand-ins of single bytes in its order: printable ones, then the others from U+0100 on."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def gpt2_bytes() -> list[bytes]:
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    return [bytes([b]) for b in [*kept, *(b for b in range(256) if b not in kept)]]


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """encoder.json and vocab.bpe of a five-merge vocabulary."""
    tokens = [*gpt2_symbols(), *("".join(m) for m in MERGES), "<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return folder


@pytest.fixture
def tiktoken_file(tmp_path: Path) -> Path:
    tokens = [*gpt2_bytes(), b"he", b"ll", b"hell", b"hello", b" w"]
    path = tmp_path / "tiny.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return path


@given(text=st.text())
def test_bytes_are_the_utf8_bytes(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode("utf-8", "surrogatepass"))
    assert tokenizer.decode(ids) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_bytes_special_ids_stand_for_no_bytes() -> None:
    tokenizer = BytesTokenizer()
    ids = [tokenizer.bos_id, 104, 105, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.token_bytes[ids].sum() == 2
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 259


def test_gpt2_ids_computed_by_hand(gpt2_folder: Path) -> None:
    tokenizer = GPT2Tokenizer(gpt2_folder)
    symbols = gpt2_symbols()
    hello, space_w = 256 + 3, 256 + 4
    assert tokenizer.encode("hello world").tolist() == [hello, space_w, *(symbols.index(c) for c in "orld")]
    # The pattern splits "'s" off, so that nothing merges across it, and a word takes its space along.
    assert tokenizer.encode("he's").tolist() == [256, symbols.index("'"), symbols.index("s")]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (261, 261, 262)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert 261 not in tokenizer.encode("<|endoftext|>")


def test_both_rank_formats_are_the_same_tokenizer(gpt2_folder: Path, tiktoken_file: Path) -> None:
    a, b, c = (
        GPT2Tokenizer(gpt2_folder),
        GPT2Tokenizer(tiktoken_file),
        GPT2Tokenizer(gpt2_folder / "vocab.bpe"),
    )
    assert a.fingerprint == b.fingerprint == c.fingerprint
    assert a.encode(TEXT).tolist() == b.encode(TEXT).tolist()


def test_bytes_per_token_add_up(tiktoken_file: Path) -> None:
    tokenizer = GPT2Tokenizer(tiktoken_file)
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    assert tokenizer.decode_bytes(ids) == TEXT.encode()
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_gpt2_survives_the_way_to_a_worker_process(tiktoken_file: Path) -> None:
    tokenizer = GPT2Tokenizer(tiktoken_file)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert copy.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "vocab.bpe").unlink(), "expected a .tiktoken file, or a folder with"),
        (lambda f: (f / "encoder.json").write_text('{"a": 0'), "damaged"),
        (lambda f: (f / "vocab.bpe").write_text("#version: 0.2\nl l\nh e\n"), "merge 0 of vocab.bpe"),
        (lambda f: (f / "encoder.json").write_text('{"a": 0, "b": 2}'), "merge 0|without gaps"),
    ],
)
def test_damaged_gpt2_files_are_named(gpt2_folder: Path, damage, message: str) -> None:
    damage(gpt2_folder)
    with pytest.raises(ValueError, match=message) as error:
        GPT2Tokenizer(gpt2_folder)
    assert str(gpt2_folder) in str(error.value)


def test_damaged_rank_file_is_named_with_its_line(tiktoken_file: Path) -> None:
    lines = tiktoken_file.read_bytes().splitlines()
    tiktoken_file.write_bytes(b"\n".join([*lines[:9], b"!!notbase64 9", *lines[10:]]))
    with pytest.raises(ValueError, match=r"tiny.tiktoken:10: expected '<base64 token> <rank>'"):
        GPT2Tokenizer(tiktoken_file)
    tiktoken_file.write_bytes(b"\n".join([*lines[:9], *lines[10:]]))
    with pytest.raises(ValueError, match="without gaps"):
        GPT2Tokenizer(tiktoken_file)


def test_ranks_of_another_vocabulary_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "GPT2_RANKS", 255)
    path = tmp_path / "cl.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(gpt2_bytes())))
    with pytest.raises(ValueError, match="256 ranks, but GPT-2 has 255"):
        GPT2Tokenizer(path)


def hf_file(path: Path, specials: list[str]) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.save(str(path))
    return path


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(hf_file(tmp_path / "tokenizer.json", ["<s>", "</s>", "<pad>"]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([0, *ids, 1]) == TEXT
    assert tokenizer.decode_bytes([0, *ids, 1]) == TEXT.encode()
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    assert ids.max() < tokenizer.vocab_size
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ids.tolist() == reference.encode(TEXT, add_special_tokens=False).ids
    assert HFTokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert [e.tolist() for e in tokenizer.encode_batch(["a b", TEXT])][1] == ids.tolist()


def test_tokenizer_json_with_one_special_token_uses_it_for_both(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(hf_file(tmp_path / "t.json", ["<|endoftext|>"]))
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0


def test_tokenizer_json_with_unusual_names(tmp_path: Path) -> None:
    path = hf_file(tmp_path / "t.json", ["[go]", "[halt]"])
    with pytest.raises(ValueError, match=r"no token named like .*bos_token"):
        HFTokenizer(path)
    tokenizer = HFTokenizer(path, bos_token="[go]", eos_token="[halt]")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    with pytest.raises(ValueError, match=r"no token '\[stop\]' to end a document"):
        HFTokenizer(path, bos_token="[go]", eos_token="[stop]")


def test_word_level_tokenizer_json_has_no_bytes_per_token(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    tokenizer.save(str(tmp_path / "w.json"))
    assert HFTokenizer(tmp_path / "w.json").token_bytes is None


def test_what_is_no_tokenizer_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(ValueError, match=r"t\.json: no such tokenizer.json"):
        HFTokenizer(path)
    path.write_text('{"model": ')
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer.json"):
        HFTokenizer(path)


def test_bpe_trained_here_is_deterministic_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT * 3, "def hello():\n    return world\n" * 5]
    a, b = train_bpe(texts, 280, tmp_path / "a.json"), train_bpe(texts, 280, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert a.fingerprint == b.fingerprint
    assert a.vocab_size == 280
    assert len({a.bos_id, a.eos_id, a.pad_id}) == 3
    first = cached_bpe(texts, 280, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text()[:100])  # as after a full disk
    assert cached_bpe(texts, 280, tmp_path / "cache").fingerprint == first.fingerprint == a.fingerprint
    monkeypatch.setattr(ours, "train_bpe", None)  # what is cached is not trained again
    assert cached_bpe(texts, 280, tmp_path / "cache").name == "bpe"
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        train_bpe(texts, 100, tmp_path / "c.json")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_json_escaped_round_trip(text: str) -> None:
    tokenizer = JsonEscaped(BytesTokenizer())
    ids = tokenizer.encode(text)
    assert bytes(ids.astype(np.uint8)) == json.dumps(text)[1:-1].encode()
    assert tokenizer.decode(ids) == text


def test_escapes_that_are_none_decode_without_a_warning() -> None:
    """A model may write a backslash before anything."""
    tokenizer = JsonEscaped(BytesTokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.decode(BytesTokenizer().encode("a\\qb")) == "a\\qb"


def test_json_escaped_slices_still_decode() -> None:
    tokenizer = JsonEscaped(BytesTokenizer())
    ids = tokenizer.encode('a\n"\u00e9"')
    assert bytes(ids.astype(np.uint8)) == b'a\\n\\"\\u00e9\\"'
    assert tokenizer.decode(ids[:-1]).startswith('a\n"\u00e9')
    assert tokenizer.fingerprint != BytesTokenizer.fingerprint


def test_fingerprints_differ_between_tokenizers(tmp_path: Path, tiktoken_file: Path) -> None:
    made = [
        BytesTokenizer(),
        GPT2Tokenizer(tiktoken_file),
        HFTokenizer(hf_file(tmp_path / "1.json", ["<s>", "</s>"])),
        HFTokenizer(hf_file(tmp_path / "2.json", ["<s>", "</s>", "<pad>"])),
        PretokenizedGPT2(),
    ]
    assert len({t.fingerprint for t in made}) == len(made)


def test_ids_without_rank_files_say_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"no rank files.*data.tokenizer_path"):
        PretokenizedGPT2().decode([1, 2])


@pytest.mark.parametrize("module", ["tiktoken", "tokenizers"])
def test_missing_package_says_what_to_install(module: str, tiktoken_file: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package '{module}'.*pip install 'foxtrot\[lm\]'"):
        GPT2Tokenizer(tiktoken_file) if module == "tiktoken" else HFTokenizer(tiktoken_file)
