"""Writes ppo.json: what TRL 1.10's PPOTrainer logs on the cases of ppo_case.py. Needs trl==1.10.0.

Run it as `python tests/golden/make_ppo.py`. The order of rows and the completions are fixed, nothing else is touched.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from ppo_case import CASES, PAD, completion_of, models, prompts, settings_of
from tiny import tiny_tokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

WATCH = ("eps", "epoch", "runtime")


def run(case: str) -> dict:
    """The log of each batch, and of each optimizer step the loss and the gradient's norm."""
    settings = settings_of(case)
    even, temperature = case == "even", settings.get("temperature", 0.7)

    def fixed(model, queries, size, pad_token_id, generation_config):
        rows = [completion_of([i for i in query.tolist() if i != PAD], even) for query in queries]
        width = max(map(len, rows))
        responses = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in rows])
        both = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, both, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / (temperature + 1e-7)

    plain_loader, permutation = ppo_trainer.DataLoader, np.random.permutation
    ppo_trainer.batch_generation = fixed
    ppo_trainer.DataLoader = lambda *a, **k: plain_loader(*a, **(k | {"shuffle": False}))
    np.random.permutation = lambda n: np.arange(n)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(output_dir=folder, num_sample_generations=0, **settings)
        given, tokenizer = models(), copy.deepcopy(tiny_tokenizer())
        tokenizer.padding_side = "left"  # TRL reads the first logit right before the completion
        trainer = PPOTrainer(args, tokenizer, train_dataset=prompts(), eval_dataset=prompts(), **given)
        norms = []
        step = trainer.optimizer.step

        def watched(*a, **k):
            if trainer.accelerator.sync_gradients:
                norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])))
            return step(*a, **k)

        trainer.optimizer.step = watched
        trainer.train()
    ppo_trainer.DataLoader, np.random.permutation = plain_loader, permutation
    logs = [{k: v for k, v in log.items() if k not in WATCH} for log in trainer.state.log_history]
    with torch.no_grad():
        weights = {
            name: float(sum(p.double().abs().sum() for p in part.parameters()))
            for name, part in (("policy", given["model"]), ("value", given["value_model"]))
        }
    return {"logs": logs, "grad_norms": norms, "weights": weights}


if __name__ == "__main__":
    found = {case: run(case) for case in CASES}
    Path(__file__).with_name("ppo.json").write_text(json.dumps(found, indent=1) + "\n")
