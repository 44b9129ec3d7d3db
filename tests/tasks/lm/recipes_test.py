"""The configs hold the paper's recipes, and what turns them into runs refuses what does not fit."""

from pathlib import Path

import pytest

from configs import fox, lm, transformer
from models.fox import FoxConfig
from tasks.common.config import default_workdir, with_defaults
from tasks.common.errors import ConfigError
from tasks.lm.config import SCHEMA, LMConfig, LMTrainConfig, freeze_all

STEP = 524_288  # tokens of a step in every run of the paper

# arch, size, budget: steps, peak learning rate, heads, sequences per device and micro-step, recomputation.
RECIPES = {
    ("fox_llama", "125m", "2.7b"): (5120, 2e-3, 12, 2, "dots"),
    ("fox_pro", "125m", "2.7b"): (5120, 2e-3, 12, 2, "dots"),
    ("fox_llama", "360m", "7.5b"): (14336, 2e-3, 16, 1, "dots"),
    ("fox_pro", "360m", "7.5b"): (14336, 2e-3, 16, 1, "dots"),
    ("fox_llama", "760m", "16b"): (30720, 1e-3, 24, 1, "full"),
    ("fox_pro", "760m", "16b"): (30720, 1e-3, 24, 1, "full"),
    ("fox_llama", "760m", "48b"): (92160, 1e-3, 24, 1, "full"),
    ("fox_pro", "760m", "48b"): (92160, 2e-3, 24, 1, "full"),
    ("transformer_llama", "125m", "2.7b"): (5120, 2e-3, 12, 2, "dots"),
    ("transformer_pro", "125m", "2.7b"): (5120, 2e-3, 12, 2, "dots"),
    ("transformer_llama", "360m", "7.5b"): (14336, 2e-3, 16, 1, "dots"),
    ("transformer_pro", "360m", "7.5b"): (14336, 2e-3, 16, 1, "dots"),
    ("transformer_llama", "760m", "16b"): (30720, 1e-3, 12, 1, "full"),
    ("transformer_pro", "760m", "16b"): (30720, 1e-3, 12, 1, "full"),
    ("transformer_llama", "760m", "48b"): (92160, 5e-4, 12, 1, "full"),
    ("transformer_pro", "760m", "48b"): (92160, 1e-3, 12, 1, "full"),
}


def _config(arg: str) -> LMConfig:
    module = transformer if "arch=transformer" in arg else fox
    return freeze_all(with_defaults(module.get_config(arg), SCHEMA))


@pytest.mark.parametrize("run", RECIPES, ids="-".join)
def test_recipe_of_the_paper(run: tuple[str, str, str]) -> None:
    arch, size, budget = run
    steps, peak_lr, heads, micro_batch, remat = RECIPES[run]
    cfg = _config(f"arch={arch},size={size},tokens={budget},path=data/longcrawl64")
    optim, train = cfg.optim, cfg.train
    assert (train.steps, train.batch_size, train.seq_len) == (steps, 32, 16384)
    assert train.micro_batch == micro_batch
    assert (optim.peak_lr, optim.total, optim.warmup) == (peak_lr, steps * STEP, 512 * STEP)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (optim.unit, optim.schedule, optim.final_lr_fraction) == ("tokens", "cosine", 0.0)
    assert (cfg.runtime.compute_dtype, cfg.runtime.remat) == ("bfloat16", remat)
    assert (cfg.model.num_heads, cfg.model.vocab_size, cfg.seed) == (heads, 50257, 0)
    assert (cfg.data.source, cfg.data.mode) == ("longcrawl64", "windows")
    assert cfg.eval.length == 65536


def test_every_recipe_is_a_declared_variant() -> None:
    """What the config contract test traces is all of the table, no more and no less."""
    declared = {v for v in (*fox.VARIANTS, *transformer.VARIANTS) if "tokens=" in v}
    expected = {f"arch={a},size={s},tokens={b},data=longcrawl64,path=data/longcrawl64" for a, s, b in RECIPES}
    assert declared == expected


@pytest.mark.parametrize("arch", lm.ARCHS)
@pytest.mark.parametrize("size", lm.SIZES)
def test_config_model_is_the_preset(arch: str, size: str) -> None:
    """The sizes are stated twice, as data for configs and for library users; they must agree."""
    cfg = _config(f"arch={arch},size={size},data=stdlib,tokenizer=bytes,vocab=1000")
    assert cfg.model == FoxConfig.preset(arch, size, vocab_size=1000)


def test_another_context_keeps_the_tokens_of_a_step() -> None:
    cfg = _config("size=125m,ctx=4k,path=x")
    assert (cfg.train.batch_size, cfg.train.seq_len, cfg.train.micro_batch) == (128, 4096, 8)
    assert cfg.train.batch_size * cfg.train.seq_len == STEP


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("arch=fox_por", "choose one of fox_llama"),
        ("size=1b", "choose one of tiny, mini"),
        ("siez=125m", "did you mean 'size'"),
        ("size=125m,tokens=many,path=x", "not an integer"),
    ],
)
def test_wrong_arguments_are_named(arg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fox.get_config(arg)


def test_micro_batches_follow_the_devices() -> None:
    train = LMTrainConfig(steps=1, batch_size=32, seq_len=8, micro_batch=2)
    assert [train.on_devices(n).accum for n in (1, 2, 16)] == [16, 8, 1]
    assert LMTrainConfig(steps=1, batch_size=32, seq_len=8, accum=4).on_devices(8).accum == 4
    with pytest.raises(ConfigError, match=r"batch_size = 32 is not divisible by .* = 2 x 3 devices = 6"):
        train.on_devices(3)
    with pytest.raises(ConfigError, match=r"micro_batch, or accum, not both"):
        LMTrainConfig(steps=1, batch_size=32, seq_len=8, accum=2, micro_batch=2)


def test_a_missing_section_is_named() -> None:
    config = dict(fox.get_config("").to_dict())
    del config["optim"]
    with pytest.raises(ConfigError, match=r"lacks the section\(s\) mesh, optim|lacks the section\(s\) optim"):
        freeze_all(config)


def test_the_same_command_finds_its_run_again() -> None:
    assert default_workdir("lm", "configs/fox.py") == Path("runs/lm/fox")
    named = default_workdir("lm", "configs/fox.py:arch=fox_llama,path=/a b/c")
    assert named == default_workdir("lm", "configs/fox.py:arch=fox_llama,path=/a b/c") != Path("runs/lm/fox")
    assert named.parent == Path("runs/lm")
    assert " " not in named.name
