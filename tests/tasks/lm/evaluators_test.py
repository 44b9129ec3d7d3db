"""Held-out figures against numbers computed by hand from a model whose losses are known."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fox
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.lm import evaluators
from tasks.lm.data import BytesTokenizer, DocumentStarts, PackedExamples
from tasks.lm.data.documents import FlatDocuments

RUNTIME = fox.FoxRuntime(attention_implementation="reference")  # compiles fastest
TOKENIZER = BytesTokenizer()
IDS = {"bos_id": TOKENIZER.bos_id, "pad_id": TOKENIZER.pad_id}
# Every logit is a constant of the label: losses can be worked out with a pencil.
WEIGHTS = np.linspace(-2.0, 2.0, TOKENIZER.vocab_size).astype(np.float32)


def documents(*texts):
    return FlatDocuments([TOKENIZER.encode(t) for t in texts], [f"doc {i}" for i in range(len(texts))])


@pytest.fixture(scope="module")
def unigram():
    """(config, params) of a model that ignores its input: hidden is a constant vector, logits are WEIGHTS."""
    config = fox.FoxConfig.preset("fox_llama", "tiny", vocab_size=TOKENIZER.vocab_size)
    params = jax.tree.map(jnp.zeros_like, fox.init_params(config, jax.random.key(0)))
    params["embed"]["embedding"] = jnp.ones_like(params["embed"]["embedding"])
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    params["lm_head"]["kernel"] = jnp.zeros_like(params["lm_head"]["kernel"]).at[0].set(WEIGHTS)
    return config, params


def expected_losses(labels):
    """Of logits WEIGHTS (the norm of a constant vector is 1 up to its epsilon)."""
    return np.log(np.exp(WEIGHTS.astype(np.float64)).sum()) - WEIGHTS.astype(np.float64)[labels]


def scorer(config, batch_size=2, devices=None):
    mesh = make_mesh(MeshConfig(), devices or jax.devices()[:1])
    return evaluators.Scorer(config, RUNTIME, mesh, batch_size)


def test_totals_of_packed_examples_by_hand(unigram):
    config, params = unigram
    text = ["hello", "é!"]
    examples = PackedExamples(documents(*text), 4, eos_id=TOKENIZER.eos_id, **IDS)
    labels = np.concatenate([[*t.encode(), TOKENIZER.eos_id] for t in text])
    found = evaluators.score_examples(scorer(config), params, examples, TOKENIZER.token_bytes)
    assert found.tokens == len(labels) == 10
    assert found.bytes == 8
    nats = expected_losses(labels).sum()
    assert found.nats == pytest.approx(nats, rel=1e-5)
    metrics = found.metrics()
    assert metrics["loss"] == pytest.approx(nats / 10, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 10), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / 8 / math.log(2), rel=1e-5)


def test_limit_and_unknown_bytes(unigram):
    config, params = unigram
    examples = PackedExamples(documents("abcdefghijk"), 4, eos_id=TOKENIZER.eos_id, **IDS)
    found = evaluators.score_examples(scorer(config), params, examples, None, limit=2)
    assert found.tokens == 8
    assert found.bits_per_byte is None
    assert found.metrics().keys() == {"loss", "perplexity"}
    assert math.isnan(evaluators.Totals(0.0, 0, 0).loss)


def test_position_report_equals_hand_computed_csv(unigram, tmp_path):
    config, params = unigram
    texts = ["abcdefgh", "ABCDEFGHIJ", "xy", "12345678"]
    report = evaluators.PositionReport(tmp_path / "eval", "unigram", train_length=4, window=3)
    whole = DocumentStarts(documents(*texts), 8, **IDS)
    hook = evaluators.positions_hook(scorer(config), whole, report, every=7)
    assert (hook.name, hook.every) == ("by_length", 7)
    metrics = hook.run(params, 10)
    labels = np.array([list(t.encode()[:8]) for t in texts if len(t) >= 8])
    mean = expected_losses(labels).mean(axis=0)
    assert metrics == pytest.approx({"ppl_8": math.exp(mean.mean())}, rel=1e-5)
    rows = list(csv.DictReader((report.folder / "per_position.csv").open()))
    np.testing.assert_allclose([float(r["loss"]) for r in rows], mean, rtol=1e-5)
    assert [r["documents"] for r in rows] == ["3"] * 8
    smoothed = [mean[max(0, i - 1) : i + 2].mean() for i in range(8)]
    np.testing.assert_allclose([float(r["smoothed_loss"]) for r in rows], smoothed, rtol=1e-5)
    assert (report.folder / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert not list(report.folder.glob(".*"))


def test_short_documents_count_where_they_reach(unigram):
    config, params = unigram
    starts = DocumentStarts(documents("abcd", "ab", "a"), 4, min_tokens=2, **IDS)
    assert len(starts) == 2
    positions, totals = evaluators.score_positions(scorer(config), params, starts)
    np.testing.assert_array_equal(positions.counts, [2, 2, 1, 1])
    np.testing.assert_allclose(positions.mean(), expected_losses(np.array(list(b"abcd"))), rtol=1e-5)
    assert totals.tokens == 6


def test_scores_are_those_of_the_model(unigram):
    config, _ = unigram
    params = fox.init_params(config, jax.random.key(5))
    examples = PackedExamples(documents("some text", "and more of it"), 8, eos_id=TOKENIZER.eos_id, **IDS)
    (batch,) = evaluators.batches_of(examples, 10)
    scored = scorer(config, 5).losses(params, batch)
    logits, _ = fox.apply(
        config, RUNTIME, params, jnp.asarray(batch["tokens"]), reset=jnp.asarray(batch["reset"])
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    plain = -np.take_along_axis(log_probs, batch["labels"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scored, np.where(batch["loss_mask"], plain, 0), atol=1e-5)


MESH_PROGRAM = """
import jax, numpy as np
from models import fox
from models.common.sharding import ShardingRules, param_shardings
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.lm import evaluators, generate
from tasks.lm.data import BytesTokenizer, PackedExamples
from tasks.lm.data.documents import FlatDocuments
from tasks.lm.sampling import Sampling

tokenizer = BytesTokenizer()
texts = [tokenizer.encode(f"document number {i} " * (i % 3 + 1)) for i in range(7)]
examples = PackedExamples(FlatDocuments(texts, list("abcdefg")), 16, bos_id=256, eos_id=257, pad_id=258)
config = fox.FoxConfig.preset("fox_pro", "tiny", vocab_size=259)
params = fox.init_params(config, jax.random.key(0))
runtime = fox.FoxRuntime(log_pruning_tolerance=-10.0)

def figures(mesh, params):
    scorer = evaluators.Scorer(config, runtime, mesh, 3)
    totals = evaluators.score_examples(scorer, params, examples, tokenizer.token_bytes)
    batch = next(evaluators.batches_of(examples, 3))
    return totals, scorer.statistics(params, batch["tokens"], batch["reset"])

one, stats_one = figures(make_mesh(MeshConfig(), jax.devices()[:1]), params)
mesh = make_mesh(MeshConfig(data=2, fsdp=4))
shardings = param_shardings(params, fox.param_axes(config), mesh, ShardingRules())
placed = jax.device_put(params, shardings)
eight, stats_eight = figures(mesh, placed)
assert one.tokens == eight.tokens and one.bytes == eight.bytes
np.testing.assert_allclose(one.nats, eight.nats, rtol=1e-6)
for a, b in zip(jax.tree.leaves(stats_one), jax.tree.leaves(stats_eight), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-5)

prompts = ["one", "another one", ""]
write = lambda params: generate.generate(
    params, config, runtime, tokenizer, prompts, max_new_tokens=5, sampling=Sampling(greedy=True))[0]
alone = write(params)
with jax.set_mesh(mesh):
    assert write(placed) == alone
print("eight devices equal one")
"""


@pytest.mark.slow  # half a minute of compiling for eight devices
def test_a_mesh_of_eight_devices_gives_the_figures_of_one(run_python):
    done = run_python("-c", MESH_PROGRAM, devices=8)
    assert "eight devices equal one" in done.stdout
