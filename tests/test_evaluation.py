"""Evaluation and prediction against transformers' Trainer, and the loss by hand."""

import weakref

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_training import history, make, pad_rows, tiny_rows
from torch.utils.data import DataLoader

from fastalign.data.batch import TokenBatch
from fastalign.data.collate import TokenCollator
from fastalign.loop import Trainer
from fastalign.loop.model_inputs import labels_of


def accuracy(prediction) -> dict:
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    scored = labels != -100
    return {"accuracy": float((logits.argmax(-1) == labels)[scored].mean()), "rows": len(labels)}


def without_speed(metrics: dict) -> dict:
    return {
        k: v for k, v in metrics.items() if "runtime" not in k and "per_second" not in k and "preparation" not in k
    }


OPTIONS = {
    "loss_only": {},
    "metrics": {"compute_metrics": accuracy},
    "accumulated": {"compute_metrics": accuracy, "eval_accumulation_steps": 1},
    "loss_only_field": {"compute_metrics": accuracy, "prediction_loss_only": True},
    "bf16": {"bf16_full_eval": True},
    "drop_last": {"dataloader_drop_last": True},
    "own_labels": {"label_names": ["labels"], "compute_metrics": accuracy},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_evaluate_equals_transformers(case, tmp_path):
    data = tiny_rows(10, 1)
    ours, theirs = (make(kind, tmp_path, eval_dataset=data, **OPTIONS[case]) for kind in ("ours", "theirs"))
    mine, reference = without_speed(ours.evaluate()), without_speed(theirs.evaluate())
    assert mine == pytest.approx(reference, rel=1e-2 if case == "bf16" else 1e-6) and "eval_loss" in mine
    assert history(ours) == [mine | {"step": 0}]


def test_loss_is_the_mean_over_examples_of_their_batch(tmp_path):
    model, data = tiny_model(), tiny_rows(6, 1)
    trainer = make("ours", tmp_path, model=model, eval_dataset=data)
    with torch.no_grad():
        first, last = (model(**pad_rows([data[i] for i in part])).loss.item() for part in (range(4), range(4, 6)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx((4 * first + 2 * last) / 6, rel=1e-6)


def test_several_sets_and_names(tmp_path):
    sets = {"short": tiny_rows(5, 1), "long": tiny_rows(7, 2)}
    ours, theirs = (make(kind, tmp_path, eval_dataset=sets) for kind in ("ours", "theirs"))
    assert without_speed(ours.evaluate()) == pytest.approx(without_speed(theirs.evaluate()), rel=1e-6)
    assert [set(e) for e in history(ours)] == [set(e) for e in history(theirs)]
    named = without_speed(ours.evaluate("long"))
    assert named == pytest.approx(without_speed(theirs.evaluate("long")), rel=1e-6)
    given = ours.evaluate({"x": sets["short"]}, metric_key_prefix="check")
    assert given["check_x_loss"] == pytest.approx(theirs.evaluate({"x": sets["short"]})["eval_x_loss"], rel=1e-6)


@pytest.mark.parametrize("concat", [True, False])
def test_predict_equals_transformers(concat, tmp_path):
    options = {"compute_metrics": accuracy if concat else None, "eval_do_concat_batches": concat}
    ours, theirs = (make(kind, tmp_path, **options).predict(tiny_rows(6, 1)) for kind in ("ours", "theirs"))
    assert without_speed(ours.metrics) == pytest.approx(without_speed(theirs.metrics), rel=1e-6)
    pairs = [(ours.predictions, theirs.predictions), (ours.label_ids, theirs.label_ids)]
    for mine, reference in pairs:
        for a, b in [(mine, reference)] if concat else zip(mine, reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_metrics_in_batches_with_inputs_and_losses(tmp_path):
    seen = {}
    for kind in ("ours", "theirs"):
        calls = seen[kind] = []

        def record(prediction, compute_result=False, calls=calls):
            # transformers hands over the whole batch as `inputs` in this mode, we the ids as in the other mode
            inputs = prediction.inputs["input_ids"] if isinstance(prediction.inputs, dict) else prediction.inputs
            shapes = [tuple(np.shape(x)) for x in (prediction.predictions, prediction.label_ids, inputs)]
            calls.append((*shapes, compute_result, np.asarray(prediction.losses).round(4).tolist()))
            return {"calls": len(calls)} if compute_result else {}

        options = {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "compute_metrics": record}
        options["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
        trainer = make(kind, tmp_path, eval_dataset=tiny_rows(8, 1), **options)
        assert trainer.evaluate()["eval_calls"] == 2
    assert seen["ours"] == seen["theirs"]
    with pytest.raises(ValueError, match="compute_result"):
        make("ours", tmp_path, batch_eval_metrics=True, compute_metrics=accuracy)


def test_inputs_for_metrics_of_the_whole_set(tmp_path):
    def ids(prediction):
        return {"sum": int(prediction.inputs.sum()), "losses": float(prediction.losses.sum())}

    options = {"include_for_metrics": ["inputs", "loss"], "compute_metrics": ids, "eval_dataset": tiny_rows(6, 1)}
    ours, theirs = (make(kind, tmp_path, **options).evaluate() for kind in ("ours", "theirs"))
    assert without_speed(ours) == pytest.approx(without_speed(theirs), rel=1e-6)


class TokenTrainer(Trainer):
    def compute_loss(self, model, inputs: TokenBatch, return_outputs=False, num_items_in_batch=None):
        assert inputs.is_padded
        outputs = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        logits = outputs.logits.flatten(0, 1)[inputs.source]
        loss = torch.nn.functional.cross_entropy(logits, inputs.targets)
        self.metrics.mean("entropy", loss.detach() * inputs.num_scored, inputs.num_scored)
        return (loss, outputs) if return_outputs else loss


def test_token_batches_are_padded_where_logits_are_wanted(tmp_path):
    data = tiny_rows(6, 1)
    theirs = make("theirs", tmp_path, eval_dataset=data, compute_metrics=accuracy)
    collator = TokenCollator(pad_token_id=0, flat=True)
    ours = make(
        "ours", tmp_path, cls=TokenTrainer, data_collator=collator, eval_dataset=data, compute_metrics=accuracy
    )
    reference, mine = without_speed(theirs.evaluate()), without_speed(ours.evaluate())
    assert "eval_entropy" in mine and mine.pop("eval_entropy") > 0
    assert mine == pytest.approx(reference, rel=1e-5)
    predicted = ours.predict(data)
    np.testing.assert_allclose(predicted.predictions, theirs.predict(data).predictions, rtol=1e-5, atol=1e-6)
    assert collator.flat
    packed = data.add_column("seq_lengths", [[len(ids)] for ids in data["input_ids"]])
    assert ours.get_eval_dataloader(packed).collate_fn.flat


def test_kept_loaders_are_those_of_their_set_and_purpose(tmp_path):
    collator = TokenCollator(pad_token_id=0, flat=True)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make("ours", tmp_path, data_collator=collator, **workers)
    data = tiny_rows(4, 1)
    flat = trainer.get_eval_dataloader(data)
    assert trainer.get_eval_dataloader(data) is flat and flat.collate_fn.flat
    assert not trainer.get_test_dataloader(data).collate_fn.flat
    known = weakref.ref(data)
    del data
    assert known() is not None  # else its id could come back with another set


def test_labels_of_token_batches():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    assert labels_of(TokenCollator(pad_token_id=0)(rows)).tolist() == [[-100, -100, 7, -100, 9]]
    padded = TokenCollator(pad_token_id=0, flat=False)(rows)
    assert labels_of(padded).tolist() == [[-100, -100, 7], [-100, 9, -100]]


def test_own_eval_loader_and_streams(tmp_path):
    data = tiny_rows(8, 1)

    class Own(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader([data[i] for i in range(8)], batch_size=4, collate_fn=pad_rows)

    plain = make("ours", tmp_path, eval_dataset=data).evaluate()["eval_loss"]
    assert make("ours", tmp_path, cls=Own, eval_dataset=data).evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    streamed = make("ours", tmp_path, eval_dataset=data.to_iterable_dataset())
    assert streamed.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_missing_metric_and_missing_set_are_named(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1"}
    trainer = make("ours", tmp_path, eval_dataset=tiny_rows(4, 1), **options)
    with pytest.raises(KeyError, match=r"metric_for_best_model='f1'.*eval_loss"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset"):
        make("ours", tmp_path, **options)
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make("ours", tmp_path).evaluate()
