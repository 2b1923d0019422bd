"""Writes sampled_pairs.json: what TRL 1.10's XPO and Nash-MD trainers log on the cases of sampled_pair_case.py.

Needs trl==1.10.0; run it as `python tests/golden/make_sampled_pairs.py`. The order of prompts and the completions are
fixed, and losses are kept before TRL rounds them; nothing else is touched.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sampled_pair_case import CASES, PAD, SETTINGS, completion_of, models, prompts, reward_model
from tiny import tiny_tokenizer
from torch.utils.data import SequentialSampler
from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
from trl.experimental.xpo import XPOConfig, XPOTrainer

TIMED = ("runtime", "per_second", "flos")


class Fixed:
    """Completions 0 and 1 of each prompt, in the order of the dataset."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

    def _generate_completions(self, one, other):
        given = one if isinstance(one, dict) else other  # XPO and Nash-MD name them in different orders
        outputs = []
        for number in (0, 1):
            rows = [completion_of(prompt, number) for prompt in given["raw"]]
            width = max(map(len, rows))
            ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
            outputs.append(torch.cat([given["input_ids"], ids], 1))
        return tuple(outputs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def run(name: str, config, trainer, case: str) -> dict:
    """The log of each step, its loss and the weights at the end."""
    with tempfile.TemporaryDirectory() as folder:
        made = type(trainer.__name__, (Fixed, trainer), {"losses": []})(
            **models(),
            reward_funcs=reward_model(),
            args=config(output_dir=folder, **(SETTINGS | CASES[name][case])),
            train_dataset=prompts().remove_columns("target"),
            processing_class=copy.deepcopy(tiny_tokenizer()),
            **({"reward_processing_classes": copy.deepcopy(tiny_tokenizer())} if name == "XPO" else {}),
        )
        made.train()
    logs = [{k: v for k, v in log.items() if not any(t in k for t in TIMED)} for log in made.state.log_history]
    with torch.no_grad():
        weights = float(sum(p.double().abs().sum() for p in made.model.parameters()))
    return {"logs": logs, "losses": made.losses, "weights": weights}


if __name__ == "__main__":
    kinds = {"XPO": (XPOConfig, XPOTrainer), "NashMD": (NashMDConfig, NashMDTrainer)}
    found = {name: {case: run(name, *kinds[name], case) for case in cases} for name, cases in CASES.items()}
    Path(__file__).with_name("sampled_pairs.json").write_text(json.dumps(found, indent=1) + "\n")
