"""The RoPE Transformers FoX is compared with: the same model and recipe without forget gates.

    python -m tasks.lm.train --config=configs/transformer.py
        Transformer (Pro), the laptop twin of `configs/fox.py`: same data, steps and learning rate.

    python -m tasks.lm.train --config=configs/transformer.py:size=125m,path=data/longcrawl64
        The paper's 125M Transformer (Pro), 5,120 steps at 16k context.

Arguments: see `configs/lm.py`.
"""

from ml_collections import ConfigDict

from configs.lm import PAPER_VARIANTS, TEXT_VARIANTS, lm_config

VARIANTS = ("", "arch=transformer_llama", *TEXT_VARIANTS["transformer"], *PAPER_VARIANTS["transformer"])


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the colon."""
    return lm_config(arg, arch="transformer_pro")
