"""What the compiler makes of the paper's 125M training step at 16k: nothing quadratic, no [B, T, V]."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import fox as fox_config
from models import fox
from models.common.sharding import ShardingRules
from tasks.common.config import with_defaults
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.common.optim import make_optimizer
from tasks.common.step import abstract_state, make_train_step
from tasks.lm.config import SCHEMA, LMConfig, freeze_all
from tasks.lm.losses import lm_loss_fn

LENGTH, MICRO_BATCH = 16384, 2
# Peak temporary memory of the step as XLA for CPU plans it, bytes. FoX (LLaMA) had 10.1 GiB when this was
# written; two of the batch's float32 logit arrays would already be 12.3 GiB.
PEAK_TEMPORARY = 12 * 2**30


def _config(arch: str) -> LMConfig:
    args = f"arch={arch},size=125m,ctx=16k,path=data/longcrawl64"
    return freeze_all(with_defaults(fox_config.get_config(args), SCHEMA))


def _compiled(cfg: LMConfig) -> Any:
    mesh = make_mesh(MeshConfig(data=1))
    shapes = jax.eval_shape(lambda key: fox.init_params(cfg.model, key), jax.random.key(0))
    optimizer = make_optimizer(cfg.optim, fox.decay_mask(shapes))
    with jax.set_mesh(mesh):
        state = abstract_state(
            lambda key: fox.init_params(cfg.model, key),
            fox.param_axes(cfg.model),
            mesh,
            ShardingRules(),
            optimizer,
        )
        step = make_train_step(lm_loss_fn(cfg.model, cfg.runtime), optimizer, seed=0)
        ids = jax.ShapeDtypeStruct((1, MICRO_BATCH, LENGTH), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, MICRO_BATCH, LENGTH), jnp.bool_)
        batch = {"tokens": ids, "labels": ids, "reset": mask, "loss_mask": mask}
        return step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["fox_llama", "fox_pro"])
def test_step_at_16k_holds_nothing_quadratic(arch: str) -> None:
    """The recipe of the configs: 125M, two sequences of 16k a micro-step, bf16 matmuls, ACP on."""
    cfg = _config(arch)
    assert fox.count_params(cfg.model) == {"fox_llama": 162_259_344, "fox_pro": 162_508_176}[arch]
    compiled = _compiled(cfg)
    logits = MICRO_BATCH * LENGTH * cfg.model.vocab_size
    shapes = set(re.findall(r"\b(pred|bf16|f16|f32|f64|s8|s32|u32|s64)\[([\d,]+)\]", compiled.as_text()))
    assert len(shapes) > 100
    for dtype, dims in shapes:
        sizes = [int(d) for d in dims.split(",")]
        assert sum(size >= LENGTH and size % LENGTH == 0 for size in sizes) < 2, f"{dtype}[{dims}]"
        elements = 1
        for size in sizes:
            elements *= size
        assert not (dtype == "f32" and elements >= logits), f"f32[{dims}] is as large as all logits"
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{arch} 125M, {MICRO_BATCH} x {LENGTH}: {temporary / 2**30:.2f} GiB of temporaries")
    assert temporary < PEAK_TEMPORARY
