"""GRPO with tools and environments: what a step learns from, and what it logs."""

import threading

import torch
from datasets import Dataset
from test_tools_native import CALL_ALWAYS, note
from tiny import tiny_model
from tool_cases import TEMPLATE, chat_tokenizer

from fastalign import GRPOConfig, GRPOTrainer
from fastalign.policy import token_stats
from fastalign.rollout.buffer import Experience
from fastalign.rollout.group_batches import GroupCollator
from fastalign.rollout.samples import Sample


class Length:
    """Rewards itself for short notes."""

    made: list = []

    def __init__(self):
        self.notes = None
        Length.made.append(self)

    def reset(self, **row):
        self.notes = []
        return f" at {row['start']}" if "start" in row else "say something"

    def note(self, text: str) -> str:
        """Notes.

        Args:
            text: what
        """
        self.notes.append(text)
        return f"noted {len(text)}"

    def get_reward(self):
        return -float(sum(len(text) for text in self.notes))


def trainer(tmp_path, dataset, *, rewards=(), tools=None, environment_factory=None, **settings):
    tokenizer = chat_tokenizer(TEMPLATE)
    tokenizer.response_template = CALL_ALWAYS
    model = tiny_model("qwen3", max_position_embeddings=512)
    model.generation_config.eos_token_id = [4, *range(6, 331, 5)]
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=settings.pop("max_steps", 2),
        learning_rate=1e-3,
        max_completion_length=160,
        max_tool_calling_iterations=2,
        beta=0.1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **settings,
    )
    more = {"tools": tools, "environment_factory": environment_factory}
    return GRPOTrainer(model, list(rewards), config, dataset, processing_class=tokenizer, **more)


def test_a_step_with_environments(tmp_path):
    Length.made.clear()
    rows = [{"prompt": [{"role": "user", "content": f"word {i}"}], "start": i} for i in range(4)]
    seen = []

    def by_turns(completions, environments, **_):
        seen.extend(environments)
        return [float(len(messages)) for messages in completions]

    run = trainer(tmp_path, Dataset.from_list(rows), rewards=[by_turns], environment_factory=Length)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.train()
    logs = run.state.log_history[0]
    assert logs["tools/call_frequency"] >= 1 and logs["tools/failure_frequency"] == 0
    assert logs["rewards/Length/mean"] < 0 < logs["rewards/by_turns/mean"]
    assert abs(logs["reward"] - logs["rewards/Length/mean"] - logs["rewards/by_turns/mean"]) < 1e-4
    assert any(not torch.equal(before[name], value) for name, value in run.model.named_parameters())
    assert len(seen) == 8 and len(Length.made) == 4  # used again in the second step


def test_prompts_may_come_from_the_environment_alone(tmp_path):
    run = trainer(tmp_path, None, environment_factory=Length)
    run.train()
    assert run.state.log_history[1]["rewards/Length/mean"] < 0


def test_tools_without_environments(tmp_path):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "word"}]}] * 2)
    run = trainer(
        tmp_path, rows, rewards=[lambda completions, **_: [float(len(c)) for c in completions]], tools=[note]
    )
    run.train()
    logs = run.state.log_history[0]
    assert logs["tools/call_frequency"] >= 1
    assert logs["completions/mean_length"] <= 160  # of the policy's own tokens


def test_prompts_of_a_group_that_differ_are_not_shared():
    """A batch that shares prompts says the same of each sample as the samples say alone."""
    model = tiny_model("qwen3")
    prompts = [[5, 6, 7, 8, 9, 10]] * 2 + [[5, 6, 7, 11]] * 2
    samples = [
        Sample({}, prompt, [20 + i, 30 + i, 4], [0.0] * 3, "stop", "", mask=[True, i % 2 == 0, True])
        for i, prompt in enumerate(prompts)
    ]
    experiences = [Experience.of(sample, group=0) for sample in samples]
    collate = GroupCollator(pad_token_id=0, flat=True, share=True)
    together = token_stats(model, collate(experiences)).stats.logp
    alone = torch.cat([token_stats(model, collate([one])).stats.logp for one in experiences])
    assert together.shape == (10,)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_limit_of_a_call_reaches_the_tools(tmp_path):
    def hang(text: str) -> str:
        """Hangs.

        Args:
            text: any
        """
        return str(over.wait(20))

    hang.__name__ = "note"
    over = threading.Event()
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "word"}]}] * 2)
    reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    run = trainer(tmp_path, rows, rewards=[reward], tools=[hang], tool_timeout=0.1, max_steps=1)
    run.train()
    over.set()
    assert run.state.log_history[0]["tools/failure_frequency"] == 1
