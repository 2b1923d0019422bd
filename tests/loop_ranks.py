"""What one or two ranks do in `test_loop_ranks.py`; started by `torchrun loop_ranks.py FILE`."""

import json
import sys

import numpy as np
import pair_runs
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import history, make, tiny_rows

import fastalign
from fastalign.data.collate import TokenCollator
from fastalign.loop import Trainer


class TokenTrainer(Trainer):
    """Next-token loss on padded token batches, with the convention for ranks."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        logits = outputs.logits.flatten(0, 1)[inputs.source]
        loss = torch.nn.functional.cross_entropy(logits, inputs.targets, reduction="sum")
        self.metrics.tokens(inputs.num_tokens)
        loss = loss / inputs.num_scored if num_items_in_batch is None else loss * self.world / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def summary(prediction) -> dict:
    """A number that any lost, repeated or misplaced row changes."""
    order = np.arange(1, len(prediction.label_ids) + 1)
    scored = np.where(prediction.label_ids == -100, 0, prediction.label_ids).sum(1)
    return {"rows": len(order), "labels": float((scored * order).sum()), "losses": float(prediction.losses.sum())}


def predicted_answers(name: str, world: int) -> list:
    """How many answers of 7 pairs `compute_metrics` gets, and the sums of their labels, in order of size."""
    config, trainer = (getattr(fastalign, f"{name}{kind}") for kind in ("Config", "Trainer"))
    made = trainer(
        model=tiny_model(),
        args=config("unused", **pair_runs.SETTINGS | {"per_device_eval_batch_size": 4 // world}),
        train_dataset=pair_runs.pair_rows(),
        processing_class=tiny_tokenizer(),
        compute_metrics=summary_of_answers,
    )
    labels = made.predict(pair_runs.pair_rows().select(range(7))).label_ids
    return [len(labels), sorted(np.where(labels == -100, 0, labels).sum(1).tolist())]


def evaluated_pairs(name: str, world: int) -> dict:
    """What the evaluation of 5 pairs says: of the second round of batches one rank has a pair, the other none."""
    config, trainer = (getattr(fastalign, f"{name}{kind}") for kind in ("Config", "Trainer"))
    made = trainer(
        model=tiny_model(),
        args=config("unused", **pair_runs.SETTINGS | {"per_device_eval_batch_size": 4 // world}),
        train_dataset=pair_runs.pair_rows(),
        processing_class=tiny_tokenizer(),
    )
    found = made.evaluate(pair_runs.pair_rows().select(range(5)))
    return {k: v for k, v in found.items() if not k.endswith(("runtime", "_per_second", "_time"))}


def summary_of_answers(prediction) -> dict:
    return {"rows": len(prediction.label_ids)}


def run(world: int) -> dict:
    """Logs of training by four examples a micro-batch over all ranks, and what evaluation says."""
    common = {"per_device_train_batch_size": 4 // world, "ddp_find_unused_parameters": False, "train": tiny_rows(24)}
    evaluated = {"eval_dataset": tiny_rows(12, 1), "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    evaluated |= {"compute_metrics": summary, "include_for_metrics": ["loss"]}
    trainer = make("ours", "unused", include_num_input_tokens_seen="non_padding", **common, **evaluated)
    trainer.train()
    uneven = trainer.predict(tiny_rows(7, 2))
    found = {"evaluated": history(trainer), "predicted": [*uneven.predictions.shape, uneven.metrics["test_rows"]]}
    collator = TokenCollator(pad_token_id=0, flat=False)
    for budget in (None, 30):
        trainer = make("ours", "unused", cls=TokenTrainer, data_collator=collator, token_budget=budget, **common)
        trainer.train()
        found[f"budget {budget}"] = history(trainer)
    common["train"] = tiny_rows(24).to_iterable_dataset()
    trainer = make("ours", "unused", max_steps=4, **common)
    trainer.train()
    found["answers"] = [predicted_answers(name, world) for name in ("DPO", "CPO")]
    found["pairs"] = [evaluated_pairs(name, world) for name in ("DPO", "CPO", "ORPO")]
    return found | {"stream": history(trainer), "rank": trainer.rank}


if __name__ == "__main__":
    result = run(world=2)
    if result["rank"] == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(result, file)
