"""Which engine a config asks for."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from fastalign.rollout.choose import make_engine
from fastalign.rollout.engine import Request, Sampling, generate

CONFIG = {
    "use_vllm": False,
    "vllm_mode": "colocate",
    "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None,
    "max_staleness": 0,
    "seed": 42,
}


def engine_of(model=None, rank=0, **settings):
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), process_index=rank)
    config = SimpleNamespace(**CONFIG | settings)
    return make_engine(config, model or tiny_model(), tiny_tokenizer(), accelerator=accelerator, sampling=Sampling(4))


def test_the_training_model_itself_samples_by_default():
    assert engine_of().name == "native"
    options = {"num_blocks": 32}
    found = engine_of(use_transformers_continuous_batching=True, transformers_continuous_batching_config=options)
    assert found.name == "continuous"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True, "use_transformers_continuous_batching": True}, "one engine samples"),
        ({"use_vllm": True, "vllm_mode": "beside"}, "`vllm_mode` is 'beside'; allowed are"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        engine_of(**settings)


def test_ranks_draw_different_tokens_for_requests_without_a_seed():
    model = tiny_model()
    found = [[c.ids for c in generate(engine_of(model, rank), [Request(0, [11], Sampling(12))])] for rank in (0, 1)]
    assert found[0] != found[1]
