"""Training runs that the tests of checkpoints, faults and ranks start, in processes of their own if need be."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from fastalign_kernels.losses.supervised import nll
from tiny import tiny_model, tiny_tokenizer

from fastalign.config import AlignConfig
from fastalign.data.collate import TokenCollator
from fastalign.loop.trainer import Trainer
from fastalign.policy import prepare_policy, token_loss

TIMES = ("runtime", "per_second", "num_tokens_per")  # parts of log keys that measure the clock


class TokenTrainer(Trainer):
    """Next-token loss on token batches, and a metric that is summed over the logging window."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of token losses over the scored tokens of the whole step."""
        norm = inputs.num_scored if num_items_in_batch is None else num_items_in_batch
        output = token_loss(model, inputs, lambda stats, span: nll(stats.logp).sum() / norm)
        self.metrics.mean("mean_logp", output.stats.logp.sum(), inputs.num_scored)
        self.metrics.tokens(inputs.num_tokens)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            return output.loss * self.world
        return output.loss


def rows(count: int = 24, seed: int = 0) -> Dataset:
    """Random rows of 4 to 40 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 41, count)
    return Dataset.from_dict({"input_ids": [rng.integers(5, 331, n).tolist() for n in lengths]})


def trainer(
    output_dir, *, family="llama", model=None, model_kwargs=None, peft=False, lora_dropout=0.1, data=None, **args
) -> TokenTrainer:
    """A small trainer on the CPU in fp32; `args` are fields of AlignConfig."""
    model = tiny_model(family, **(model_kwargs or {})) if model is None else model
    if peft:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        model = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=4, lora_dropout=lora_dropout, target_modules=["q_proj", "v_proj"])
        )
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    defaults |= {"max_steps": 8, "save_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    defaults |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "seed": 3}
    config = AlignConfig(str(output_dir), **(defaults | args))
    info = prepare_policy(model)
    collator = TokenCollator(pad_token_id=0, flat=info.flat)
    data = rows() if data is None else data
    return TokenTrainer(model, config, data_collator=collator, train_dataset=data, processing_class=tiny_tokenizer())


def history(state) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in state.log_history]


def run(output_dir, *, resume=None, result=None, **options) -> None:
    """Train and write log and weights to the file `result`."""
    torch.set_num_threads(1)
    made = trainer(output_dir, **options)
    made.train(resume_from_checkpoint=resume)
    if result is not None:
        weights = {k: v.clone() for k, v in made.model.state_dict().items()}
        torch.save({"history": history(made.state), "weights": weights}, result)
