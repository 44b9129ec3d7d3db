"""Generation against the full forward pass, in batches, with every way to stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fox
from tasks.lm.data import BytesTokenizer
from tasks.lm.generate import encode_prompts, generate
from tasks.lm.sampling import Sampling

TOKENIZER = BytesTokenizer()
RUNTIME = fox.FoxRuntime(attention_implementation="reference")  # compiles fastest
PROMPTS = ["def f(x):\n", "", "é", "a rather longer prompt than the others, to be padded against"]
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def model():
    config = fox.FoxConfig.preset("fox_pro", "tiny", vocab_size=TOKENIZER.vocab_size)
    params = fox.init_params(config, jax.random.key(3))
    # larger than at initialisation, so that logits differ clearly and text is not one repeated byte
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] * 40
    return config, params


def run(model, prompts, **options):
    config, params = model
    options = {"max_new_tokens": 12, "sampling": GREEDY, "stop_ids": ()} | options
    return generate(params, config, RUNTIME, TOKENIZER, prompts, **options)[0]


def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(model):
    config, params = model
    (result,) = run(model, PROMPTS[:1])
    prompt = encode_prompts(TOKENIZER, PROMPTS[:1], config.vocab_size)[0]
    tokens = np.concatenate([prompt, np.array(result.ids, np.int32)])
    logits, _ = fox.apply(config, RUNTIME, params, jnp.asarray(tokens[None, :-1]))
    np.testing.assert_array_equal(np.argmax(logits[0], axis=-1)[len(prompt) - 1 :], result.ids)
    assert len(set(result.ids)) > 3
    assert result.stop == "length"
    assert result.text == TOKENIZER.decode(result.ids)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 7}, {"batch_size": 2}])
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(model, options):
    together = run(model, PROMPTS, **options)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result == run(model, [prompt])[0]


def test_seeds_and_rows(model):
    draw = lambda seed, prompts, **options: [  # noqa: E731
        r.ids for r in run(model, prompts, seed=seed, sampling=Sampling(temperature=5.0), **options)
    ]
    first = draw(1, ["x"] * 3)
    assert draw(1, ["x"] * 3) == first
    assert draw(1, ["x"] * 3, batch_size=1) == first
    assert len({*first, *draw(2, ["x"] * 3)}) == 6


def test_stop_ids_end_each_row_by_itself(model):
    free = run(model, PROMPTS)
    stop = free[0].ids[4]
    stopped = run(model, PROMPTS, stop_ids=(stop,))
    for before, after in zip(free, stopped, strict=True):
        if stop in before.ids:
            assert after.ids == before.ids[: before.ids.index(stop) + 1]
            assert after.stop == "stop_id"
            assert after.text == TOKENIZER.decode(after.ids[:-1])
        else:
            assert after == before
    assert {r.stop for r in stopped} >= {"stop_id"}


@pytest.mark.slow
def test_the_end_of_document_stops_by_default(model):
    config, params = model
    params = jax.tree.map(lambda x: x, params)
    bias = jnp.zeros_like(params["lm_head"]["kernel"])
    params["lm_head"]["kernel"] = bias  # all logits equal: greedy takes id 0
    results, _ = generate(params, config, RUNTIME, TOKENIZER, ["a"], max_new_tokens=3, sampling=GREEDY)
    assert results[0].ids == (0, 0, 0)
    end = TOKENIZER.eos_id
    hidden, _ = fox.apply(
        config, RUNTIME, params, jnp.asarray(encode_prompts(TOKENIZER, ["a"], 259)[0][None]), output="hidden"
    )
    params["lm_head"]["kernel"] = bias.at[:, end].set(hidden[0, -1])
    results, _ = generate(params, config, RUNTIME, TOKENIZER, ["a"], max_new_tokens=3, sampling=GREEDY)
    assert results[0] == ("a", "", (end,), "stop_id")


def test_stop_text_ends_before_it_and_streams_nothing_of_it(model):
    free = run(model, PROMPTS[:1], max_new_tokens=16)[0]
    stop = free.text[3:5]
    pieces = []
    (result,) = run(
        model,
        PROMPTS[:1],
        max_new_tokens=16,
        stop_text=[stop],
        on_text=lambda row, text: pieces.append(text),
    )
    assert result.stop == "stop_text"
    assert result.text == "".join(pieces) == free.text[: free.text.index(stop)]


def test_text_streams_as_it_is_decoded(model):
    pieces = []
    (result,) = run(model, PROMPTS[:1], on_text=lambda row, text: pieces.append((row, text)))
    assert "".join(text for _, text in pieces) == result.text
    assert len(pieces) > 1
    assert {row for row, _ in pieces} == {0}


def test_timing_counts_tokens(model):
    config, params = model
    results, timing = generate(
        params, config, RUNTIME, TOKENIZER, ["ab", ""], max_new_tokens=4, sampling=GREEDY, stop_ids=()
    )
    assert timing.prompt_tokens == 4
    assert timing.new_tokens == 8 == sum(len(r.ids) for r in results)
    assert timing.tokens_per_second > 0
    _, short = generate(params, config, RUNTIME, TOKENIZER, ["ab"], max_new_tokens=1)
    assert short.tokens_per_second is None


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([""], {"add_bos": False}, "prompt 0 has no tokens"),
        (["abc"], {"max_length": 10}, "prompt 0 has 4 tokens.*max_length is 10"),
        (["abc"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (["abc"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["abc"], {"seed": -1}, "seed must be in"),
        (["abc"], {"stop_ids": (9999,)}, "stop id 9999 is outside"),
        (["abc"], {"stop_text": [""]}, "empty stop text"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, prompts, **options)


def test_ids_the_model_does_not_know_name_the_prompt():
    small = fox.FoxConfig.preset("fox_llama", "tiny", vocab_size=100)
    with pytest.raises(ValueError, match=r"prompt 1 holds token id 195 .token 1.*knows ids 0 to 99"):
        encode_prompts(TOKENIZER, ["a", "aé"], small.vocab_size, add_bos=False)


def test_broken_parameters_are_noticed(model):
    config, params = model
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="not finite at new token 0 of prompt 0"):
        generate(broken, config, RUNTIME, TOKENIZER, ["a"], max_new_tokens=2)
