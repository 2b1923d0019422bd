"""Rollouts without tools: prompts as TRL tokenises them, groups as they finish, seeds."""

import copy

import pytest
from scripted_engine import ScriptedEngine
from tiny import tiny_tokenizer

from fastalign.rollout.engine import Sampling
from fastalign.rollout.episodes import Rollouts, episode_seed

SAMPLING = Sampling(max_new_tokens=8, stop_ids=(2,))


def echo(request):
    """The last three ids of the prompt, then the end; the row's number of steps does not matter."""
    return [*request.prompt_ids[-3:], 2]


def test_groups_of_text():
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(echo)
    rows = [{"prompt": "what is two", "answer": "2"}, {"prompt": "the lazy dog", "answer": "3"}]
    groups = list(Rollouts(engine, tokenizer, SAMPLING).run(rows, 3, seed=7))
    assert [group.index for group in groups] == [0, 1]
    for row, group in zip(rows, groups, strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        for sample in group.samples:
            assert sample.row is row
            assert sample.prompt_ids == ids
            assert sample.completion_ids == [*ids[-3:], 2]
            assert sample.logps == [-0.01 * token for token in sample.completion_ids]
            assert sample.completion == tokenizer.decode(ids[-3:])  # without the end token
            assert (sample.mask, sample.finish_reason, sample.version) == (None, "stop", 3)
    assert len({request.seed for request in engine.seen}) == 6
    again = ScriptedEngine(echo)
    list(Rollouts(again, tokenizer, SAMPLING).run(rows, 3, seed=7))
    assert [request.seed for request in again.seen] == [request.seed for request in engine.seen]


def test_messages_and_template_arguments():
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "it is"}]}]
    (group,) = Rollouts(ScriptedEngine(echo), tokenizer, SAMPLING).run(rows, 1, seed=0)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nit is<|im_end|>\n<|im_start|>assistant\n"
    (sample,) = group.samples
    assert sample.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.completion == [{"role": "assistant", "content": "tant\n"}]  # without the end token

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ word }} {{ messages[0]['content'] }}"
    rollouts = Rollouts(ScriptedEngine(echo), tokenizer, SAMPLING, chat_template_kwargs={"word": "fox"})
    (group,) = rollouts.run(rows, 1, seed=0)
    assert tokenizer.decode(group.samples[0].prompt_ids) == "fox hello"


def test_a_group_is_given_out_when_its_last_sample_is_there():
    engine = ScriptedEngine(echo, newest_first=True)
    rows = [{"prompt": "zero"}, {"prompt": "one"}, {"prompt": "two two"}]
    run = Rollouts(engine, tiny_tokenizer(), SAMPLING).run(rows, 2, seed=1)
    assert next(run).index == 2 and engine.pending == 4  # the first two groups are not even begun
    assert next(run).index == 1 and engine.pending == 2
    run.close()
    assert (engine.aborted, engine.pending) == (2, 0)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="has no tokens"):
        next(Rollouts(ScriptedEngine(echo), tiny_tokenizer(), SAMPLING).run([{"prompt": ""}], 2, seed=0))


def test_seeds_differ_by_every_part():
    seeds = {
        episode_seed(seed, i, j, turn) for seed in (-1, 0, 5) for i in range(4) for j in range(4) for turn in (0, 1)
    }
    assert len(seeds) == 3 * 4 * 4 * 2 and all(0 <= seed < 2**63 for seed in seeds)


def test_images_are_refused():
    rollouts = Rollouts(ScriptedEngine(echo), tiny_tokenizer(), SAMPLING)
    with pytest.raises(ValueError, match="A row has images"):
        next(rollouts.run([{"prompt": "what", "images": [object()]}], 1, seed=0))
    parts = [{"type": "text", "text": "what"}, {"type": "image", "image": object()}]
    with pytest.raises(ValueError, match=r"content of type \['image'\]"):
        next(rollouts.run([{"prompt": [{"role": "user", "content": parts}]}], 1, seed=0))
