"""What two ranks do in `test_dpo_ranks.py`; started by `accelerate launch dpo_ranks.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from dpo_runs import losses, train
from test_parity_sft import _lora
from tiny import tiny_model

from fastalign import reference

CASES = {  # name -> settings; a model's seed and adapters become constructor arguments
    "second-model": {"reference_seed": 1},
    "copied-and-synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "cached": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "adapter": {"lora": True},
}


def run(folder: Path, accumulation: int) -> dict[str, list]:
    """Losses, gradient norms and margins of every case; ranks see the batches of one process that accumulates."""
    reference.HF_DATASETS_CACHE = str(folder / "cache")
    found = {}
    for name, case in CASES.items():
        options = dict(case)
        if "reference_seed" in options:
            options["ref_model"] = tiny_model(seed=options.pop("reference_seed"))
        if options.pop("lora", False):
            options["peft_config"] = _lora()
        # Adam divides by the size of the gradient: with a larger epsilon, rounding stays rounding
        options |= {"adam_epsilon": 1e-3, "learning_rate": 1e-2, "max_steps": 2}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
        trainer = train(folder / name, **options)
        found[name] = losses(trainer).tolist()
        found["kind"] = f"{trainer.accelerator.distributed_type.name} {trainer.world}"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    result = run(root, accumulation=1)
    if int(torch.distributed.get_rank()) == 0:
        (root / "found.json").write_text(json.dumps(result))
