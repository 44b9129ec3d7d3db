"""FoX, the Forgetting Transformer (arXiv 2503.02130), with Adaptive Computation Pruning (arXiv 2504.06949).

    python -m tasks.lm.train --config=configs/fox.py
        FoX (Pro), 3.5 M parameters, on the running Python's own standard library: 300 steps of 2,048 tokens
        in minutes on two CPU cores.

    python -m tasks.lm.train --config=configs/fox.py:arch=fox_pro,size=760m,tokens=48b,path=data/longcrawl64
        The paper's largest run, its hyper-parameters: 92,160 steps of 524,288 tokens at 16k context.

Arguments: see `configs/lm.py`.
"""

from ml_collections import ConfigDict

from configs.lm import PAPER_VARIANTS, TEXT_VARIANTS, lm_config

VARIANTS = ("", "arch=fox_llama", *TEXT_VARIANTS["fox"], *PAPER_VARIANTS["fox"])


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the colon."""
    return lm_config(arg, arch="fox_pro")
