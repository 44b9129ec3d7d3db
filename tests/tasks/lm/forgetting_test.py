"""Gate statistics against gates set by hand."""

import csv
import io

import jax
import numpy as np
import pytest

from kernels.forgetting_attention import TileConfig
from models import fox
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.lm import forgetting
from tasks.lm.data import BytesTokenizer, DocumentStarts
from tasks.lm.data.documents import FlatDocuments
from tasks.lm.evaluators import Scorer

TILE = 4
LENGTH = 16


@pytest.fixture(scope="module")
def documents():
    tokenizer = BytesTokenizer()
    texts = [tokenizer.encode(t * 4) for t in ("abcdefgh", "ABCDEFGH", "short ok")]
    ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    return DocumentStarts(FlatDocuments(texts, ["a", "b", "c"]), LENGTH, **ids)


def make(fgate_type="bias_only", tolerance=-10.0):
    config = fox.FoxConfig(
        vocab_size=259,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=8,
        qk_norm=True,
        fgate_type=fgate_type,
        use_rope=fgate_type == "none",
    )
    runtime = fox.FoxRuntime(log_pruning_tolerance=tolerance, tiles=TileConfig(forward=(TILE, TILE)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Scorer(config, runtime, mesh, 2), fox.init_params(config, jax.random.key(0))


def test_pruned_fraction_and_rates_by_hand(documents):
    """Head 0 forgets 30 nats a token: only its diagonal tiles stay. Head 1 keeps everything."""
    scorer, params = make()
    bias = np.array([-30.0, 30.0], np.float32)
    for layer in params["layers"].values():
        layer["attn"]["fgate"]["bias"] = bias
    found = forgetting.measure_forgetting(scorer, params, documents, limit=3)
    np.testing.assert_allclose(found.rate, [[30, np.exp(-30)]] * 2, rtol=1e-5)
    # Pruned is D < -(2 sqrt(4) + log 16) - 10 = -16.8. A tile left of the diagonal has its largest D at
    # distance 1: -30. So of 4 + 3 + 2 + 1 tiles the 4 diagonal ones stay.
    np.testing.assert_allclose(found.visited, [[0.4, 1.0]] * 2)
    assert found.pruned == pytest.approx(0.3)
    assert (found.documents, found.length) == (3, LENGTH)
    assert found.log_fgate.shape == (2, LENGTH, 2)
    rows = list(csv.DictReader(io.StringIO(forgetting.forgetting_csv(found))))
    assert [(r["layer"], r["head"]) for r in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert float(rows[0]["pruned_fraction"]) == pytest.approx(0.6)
    assert float(rows[0]["decay_time"]) == pytest.approx(1 / 30)


@pytest.mark.parametrize("tolerance", [-10.0, None])
def test_the_hook_measures_every_head_also_of_a_run_that_does_not_prune(documents, tolerance):
    scorer, params = make(tolerance=tolerance)
    for layer in params["layers"].values():
        layer["attn"]["fgate"]["bias"] = np.array([-30.0, 30.0], np.float32)
    hook = forgetting.pruning_hook(scorer, documents, limit=3, every=7)
    assert (hook.name, hook.every) == ("pruning", 7)
    found = hook.run(params, 0)
    heads = {f"layer_0{layer}/head_0{head}": [0.6, 0.0][head] for layer in (0, 1) for head in (0, 1)}
    assert found == pytest.approx({"pruned": 0.3, **heads}, abs=1e-6)


def test_the_hook_prunes_as_the_run_does(documents):
    """Its own tolerance, not the published one: D = -8 is below -6.8 - 0.001 and above -6.8 - 10."""
    pruned = []
    for tolerance in (-0.001, -10.0):
        scorer, params = make(tolerance=tolerance)
        for layer in params["layers"].values():
            layer["attn"]["fgate"]["bias"] = np.array([-8.0, -8.0], np.float32)
        pruned.append(forgetting.pruning_hook(scorer, documents, limit=1).run(params, 0)["pruned"])
    assert pruned[0] > pruned[1]


@pytest.mark.slow
def test_files_with_and_without_pruning(documents, tmp_path):
    scorer, params = make("full")
    found = forgetting.measure_forgetting(scorer, params, documents, limit=1)
    paths = forgetting.write_forgetting(found, tmp_path / "on", -10.0)
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "on").iterdir())
    assert {"acp.csv", "acp.png", "gates_00.png", "gates_01.png", "decay_00.png", "decay_01.png"} == {
        p.name for p in paths
    }
    scorer, params = make("full", tolerance=None)
    found = forgetting.measure_forgetting(scorer, params, documents, limit=1)
    assert found.visited is None
    assert found.pruned is None
    names = {p.name for p in forgetting.write_forgetting(found, tmp_path / "off", None)}
    assert "acp.png" not in names
    assert "acp.csv" in names


def test_a_model_without_gates_is_refused(documents):
    scorer, params = make("none", tolerance=None)
    with pytest.raises(ValueError, match="no forget gates"):
        forgetting.measure_forgetting(scorer, params, documents, limit=1)


def test_padded_documents_are_refused():
    tokenizer = BytesTokenizer()
    short = FlatDocuments([tokenizer.encode("abc")], ["a"])
    starts = DocumentStarts(short, LENGTH, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id, min_tokens=1)
    scorer, params = make()
    with pytest.raises(ValueError, match="whole documents"):
        forgetting.measure_forgetting(scorer, params, starts, limit=1)


def test_heads_are_picked_from_fast_to_slow():
    assert forgetting.spread_heads(np.array([0.1, 5.0, 1.0])) == [1, 2, 0]
    assert forgetting.spread_heads(np.arange(9.0), most=3) == [8, 4, 0]
    assert forgetting.spread_heads(np.array([1.0]), most=4) == [0]
