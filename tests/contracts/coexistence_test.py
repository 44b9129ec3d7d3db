"""Beside Hugging Face transformers (and lm-eval), which look for a package called `kernels` of their own.

What transformers 5 does: it finds our `kernels`, asks for its version (that of its distribution, foxtrot, or
without metadata `kernels.__version__`) and uses it only within the narrow range it supports. So ours carries
no `__version__`, and a test below fails should foxtrot fall into that range one day. The real `kernels`
distribution cannot share an environment with ours: the first on the path wins, and ours then says so.
"""

import importlib.util

import pytest

ORDERS = {
    "ours first": "import kernels, models.fox, tasks; import {other}",
    "theirs first": "import {other}; import kernels, models.fox, tasks",
}
TRANSFORMERS = """
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_kernels_available
from tokenizers import Tokenizer, models as tokenizer_models
import kernels.forgetting_attention

assert not is_kernels_available(), "transformers would call into our kernels package"
words = Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
assert PreTrainedTokenizerFast(tokenizer_object=words).encode("b") == [1]
assert LlamaConfig(num_hidden_layers=3).num_hidden_layers == 3
assert kernels.__path__[0].endswith("kernels") and callable(kernels.forgetting_attention.forgetting_attention)
print("works")
"""
LM_EVAL = """
from lm_eval import evaluator
from lm_eval.api.model import LM
import kernels.forgetting_attention

class Constant(LM):
    def loglikelihood(self, requests): return [(0.0, True) for _ in requests]
    def loglikelihood_rolling(self, requests): return [0.0 for _ in requests]
    def generate_until(self, requests): return ["" for _ in requests]

assert callable(evaluator.evaluate) and Constant().loglikelihood([1]) == [(0.0, True)]
print("works")
"""
# transformers installed as a plain folder, ours without any metadata: then it imports the package it found.
NO_METADATA = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name in ("kernels", "foxtrot"):
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", ["", NO_METADATA], ids=["installed", "not installed"])
def test_transformers_works_beside_ours(run_python, order, before):
    program = before + ORDERS[order].format(other="transformers") + TRANSFORMERS
    assert run_python("-c", program, env={"HF_HUB_OFFLINE": "1"}).stdout.strip().endswith("works")


@pytest.mark.parametrize("order", ORDERS)
def test_lm_eval_works_beside_ours(run_python, order):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (extra: eval)")
    program = ORDERS[order].format(other="lm_eval") + LM_EVAL
    assert run_python("-c", program, env={"HF_HUB_OFFLINE": "1"}).stdout.strip().endswith("works")


def test_our_kernels_claim_no_version(run_python):
    """transformers would read `kernels.__version__` as that of the package it looks for."""
    program = (
        "import kernels, models, tasks; print([hasattr(p, '__version__') for p in (kernels, models, tasks)])"
    )
    assert run_python("-c", program).stdout.strip() == "[False, False, False]"
