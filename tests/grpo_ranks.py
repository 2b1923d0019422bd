"""What two ranks do in `test_grpo.py`; started by `accelerate launch grpo_ranks.py FOLDER`."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from grpo_runs import grpo_trainer, length_reward, rollout

from fastalign.loop.weights import content_hash

KEYS = ("loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "completions/max_length", "num_tokens")
RESUMED = 3
CASES = {  # name -> settings of two ranks; "together": those of one process, "split": groups are spread over ranks
    "whole groups": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "together": 2},
    "spread groups": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "together": 2,
        "split": True,
    },
    "off policy": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "together": 2}
    | {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "token_budget": 70},
}


def half(completion_ids, target, **kwargs):
    """Advantages of zero for some groups, so that ranks run different numbers of sequences."""
    return [score * (t % 2) for score, t in zip(length_reward(completion_ids, target), target, strict=True)]


def run(folder: Path, world: int) -> dict[str, list]:
    """The log of every case; one process accumulates what two ranks learn from at once."""
    found = {}
    for name, case in CASES.items():
        options = dict(case)
        together, split = options.pop("together"), options.pop("split", False)
        if world == 1:
            options["gradient_accumulation_steps"] *= together
        rank = int(os.environ.get("RANK", "0"))
        offset = 2 * rank if split else 0
        options["rollout_func"] = functools.partial(rollout, offset=offset)
        # Adam divides by the size of the gradient: with a larger epsilon, rounding stays rounding
        trainer = grpo_trainer(folder / name, rewards=half, adam_epsilon=1e-3, max_steps=4, **options)
        trainer.train()
        found[name] = [{k: e[k] for k in KEYS if k in e} for e in trainer.state.log_history if "loss" in e]
    return found


def sampled(folder: Path, resume: bool | None = None) -> dict:
    """The log of six steps, of which four learn from one generation batch, and a digest of this rank's weights."""
    options = {"steps_per_generation": 4, "per_device_train_batch_size": 2, "num_iterations": 2, "beta": 0.1}
    options |= {"max_completion_length": 6, "max_steps": 6, "save_strategy": "steps", "save_steps": RESUMED}
    trainer = grpo_trainer(folder, fixed=False, **options)
    trainer.train(resume_from_checkpoint=resume)
    log = [{k: v for k, v in e.items() if "time" not in k} for e in trainer.state.log_history if "loss" in e]
    return {"log": log, "weights": content_hash(trainer.model)}


def resumed(folder: Path, rank: int) -> dict[str, dict]:
    """`sampled` as it is, and gone on with within a generation batch, from the second time that it is gone through."""
    whole = sampled(folder / "whole")
    if rank == 0:
        shutil.copytree(folder / "whole" / f"checkpoint-{RESUMED}", folder / "again" / f"checkpoint-{RESUMED}")
    torch.distributed.barrier()
    return {"whole": whole, "again": sampled(folder / "again", resume=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    result = run(root / "two", world=2)
    own = int(torch.distributed.get_rank())
    if own == 0:
        (root / "found.json").write_text(json.dumps(result))
    (root / f"resumed-{own}.json").write_text(json.dumps(resumed(root, own)))
