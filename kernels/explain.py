"""python -m kernels.explain [op] [--shape=...]: which implementation of an op would run here, and why not
the others.

Op packages that offer it have a function `explain_shape(shape, dtype, **options)` in their api module.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp


def ops() -> list[str]:
    """Names of the op packages: folders beside this file that have an api module."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/api.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one explanation per op; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.explain", description=main.__doc__)
    parser.add_argument("op", nargs="*", help=f"ops to explain: {', '.join(ops())} (default: all)")
    parser.add_argument(
        "--shape", default="", help="sizes such as B2,T16384,N16,K16,H64; the rest is default"
    )
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the inputs (default: bfloat16)")
    parser.add_argument(
        "--pruning", choices=("auto", "tight"), default=None, help="pruning mode of attention"
    )
    parser.add_argument("--implementation", default=None, help="as in the call: a name, or names with commas")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.op) - set(ops()))
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; known ones are {', '.join(ops())}")
    try:
        sizes = parse_sizes(args.shape)
        jnp.dtype(args.dtype)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    names = args.implementation.split(",") if args.implementation else None
    wanted = names[0] if names and len(names) == 1 else names
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    for op in args.op or ops():
        module = importlib.import_module(f"kernels.{op}.api")
        try:
            print(module.explain_shape(sizes, args.dtype, pruning=args.pruning, implementation=wanted))
        except ValueError as error:
            parser.error(str(error))
    return 0


def parse_sizes(text: str) -> dict[str, int]:
    """ "B2,T16384" -> {"B": 2, "T": 16384}.

    Raises:
      ValueError: a part is not a letter followed by a positive number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        letter, digits = part[:1], part[1:]
        if not letter.isupper() or not digits.isdigit() or int(digits) == 0:
            raise ValueError(f"--shape: {part!r} is not a size; write for example B2,T16384,N16,H64")
        sizes[letter] = int(digits)
    return sizes


if __name__ == "__main__":
    raise SystemExit(main())
