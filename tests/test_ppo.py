"""PPOTrainer against what TRL 1.10 logged (golden/ppo.json), and what must not change its numbers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from ppo_case import CASES, completion_of, models, prompts, settings_of
from tiny import tiny_tokenizer

import fastalign

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ppo.json").read_text())
COUNT_PADDING = ("policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var")  # in TRL
RTOL = 1e-5


class InOrder(fastalign.PPOTrainer):
    """Takes completions as they come in each pass, as the golden runs do."""

    def order(self, num_rows, step, epoch):
        return list(range(num_rows))


def rollout(even: bool):
    texts = tiny_tokenizer().batch_decode([row["input_ids"] for row in prompts()])
    ids_of = {text: row["input_ids"] for text, row in zip(texts, prompts(), strict=True)}
    assert len(ids_of) == len(texts)

    def fixed(given, trainer):
        ids = [ids_of[text] for text in given]
        return {
            "prompt_ids": ids,
            "completion_ids": [completion_of(one, even) for one in ids],
            "logprobs": [None] * len(ids),
        }

    return fixed


def run(folder, case: str, cls=InOrder, **changes):
    settings = settings_of(case) | {"shuffle_dataset": False, "num_sample_generations": 0} | changes
    args = fastalign.PPOConfig(str(folder), **settings)
    trainer = cls(
        args,
        copy.deepcopy(tiny_tokenizer()),
        **models(),
        train_dataset=prompts(),
        rollout_func=rollout(case == "even"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_every_number_equals_trl(case, tmp_path):
    trainer, golden = run(tmp_path, case), GOLDEN[case]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(golden["logs"])
    updates = len(golden["grad_norms"]) // len(logs)
    for own, theirs, norm in zip(logs, golden["logs"], golden["grad_norms"][updates - 1 :: updates], strict=True):
        assert own["grad_norm"] == pytest.approx(norm, rel=RTOL)  # of the batch's last update
        for name, value in theirs.items():
            if case == "even" or name not in COUNT_PADDING:
                assert own[name] == pytest.approx(value, rel=RTOL, abs=1e-6), name
    with torch.no_grad():
        for name, part in {"policy": trainer.model, "value": trainer.value_model}.items():
            total = float(sum(p.double().abs().sum() for p in part.parameters()))
            assert total == pytest.approx(golden["weights"][name], rel=1e-6)
