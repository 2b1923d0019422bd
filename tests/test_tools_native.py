"""Conversations with tools on the embedded engine: what it reports is what the model says of the whole sequence."""

import math
import random
import threading

import torch
from tiny import tiny_model
from tool_cases import TEMPLATE, chat_tokenizer, user

from fastalign.rollout.engine import Sampling
from fastalign.rollout.episodes import Rollouts
from fastalign.rollout.native import NativeEngine

CALL_ALWAYS = {  # whatever the model writes is a call of `note`
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": "(?=.)",
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "note", "arguments": {"text": "{content}"}}},
        }
    },
}


def rollouts(tool, **settings):
    tokenizer = chat_tokenizer(TEMPLATE)
    tokenizer.response_template = CALL_ALWAYS
    model = tiny_model("qwen3", max_position_embeddings=512)
    sampling = Sampling(160, stop_ids=(4, *range(6, 331, 5)))
    return Rollouts(NativeEngine(model), tokenizer, sampling, tools=[tool], **settings), model


def note(text: str) -> str:
    """Notes.

    Args:
        text: what
    """
    return f"got {len(text)}"


def all_samples(runs, seed):
    groups = sorted(runs.run([user("what is two"), user("hello")], 3, seed), key=lambda group: group.index)
    return [sample for group in groups for sample in group.samples]


def test_log_probabilities_are_those_of_the_whole_sequence():
    runs, model = rollouts(note, max_tool_calling_iterations=3)
    samples = all_samples(runs, seed=5)
    assert all(sample.tool_calls >= 1 for sample in samples) and max(sample.tool_calls for sample in samples) == 3
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logps = logps.gather(1, ids[0, 1:, None])[len(sample.prompt_ids) - 1 :, 0].tolist()
        assert len(sample.completion_ids) == len(sample.mask) == len(sample.logps) <= 160
        for mine, own, told in zip(sample.mask, logps, sample.logps, strict=True):
            assert abs(own - told) < 1e-4 if mine else math.isnan(told)
        whole = runs.tokens.tokenizer.decode(sample.completion_ids)
        answers = [message["content"] for message in sample.completion if message["role"] == "tool"]
        assert all(f"<|im_start|>tool\n{answer}<|im_end|>\n<|im_start|>assistant\n" in whole for answer in answers)


def test_samples_do_not_depend_on_how_long_tools_take():
    """Tools that return in another order meet other batches in the engine; seeds make the samples the same."""

    def noting(salt):
        def note(text: str) -> str:
            """Notes.

            Args:
                text: what
            """
            threading.Event().wait(random.Random(text + salt).random() * 0.05)
            return f"got {len(text)}"

        return note

    seen = []
    for salt in ("a", "b"):
        samples = all_samples(rollouts(noting(salt), max_tool_calling_iterations=2)[0], seed=9)
        seen.append([(sample.prompt_ids, sample.completion_ids, sample.mask) for sample in samples])
    assert seen[0] == seen[1]
    assert len({tuple(ids) for _, ids, _ in seen[0]}) == 6


def test_samples_go_on_while_a_tool_works():
    """The first call of one sample returns when another has made all of its three."""
    counts: dict[str, int] = {}
    last = threading.Event()
    lock = threading.Lock()

    class Slowest:
        def reset(self, **row):
            with lock:
                self.name = str(len(counts))
                counts[self.name] = 0

        def note(self, text: str) -> str:
            """Notes.

            Args:
                text: what
            """
            counts[self.name] += 1
            if counts[self.name] == 3:
                last.set()
            if self.name == "0" and counts["0"] == 1:
                return str(last.wait(20))
            return "noted"

    tokenizer = chat_tokenizer(TEMPLATE)
    tokenizer.response_template = CALL_ALWAYS
    engine = NativeEngine(tiny_model("qwen3", max_position_embeddings=1024))
    sampling = Sampling(400, stop_ids=(4, *range(6, 331, 5)))
    runs = Rollouts(engine, tokenizer, sampling, environment_factory=Slowest, max_tool_calling_iterations=3)
    (group,) = runs.run([user("what")], 3, seed=2)
    slow = next(sample for sample in group.samples if sample.environment.name == "0")
    assert slow.completion[1]["content"] == "True"  # not the end of the waiting
