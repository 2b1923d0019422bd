"""The loop does what transformers' Trainer does: the same numbers, the same events, the same state."""

import copy

import pytest
import torch
import transformers
from tiny import tiny_model
from tiny_training import assert_same_run, assert_same_values, history, make, pad_rows, tiny_rows, weights
from torch.utils.data import DataLoader

from fastalign.data.batch import TokenBatch
from fastalign.data.collate import TokenCollator
from fastalign.loop import Trainer
from fastalign.loop.plan import starting_batch_size

EVAL = {"eval_strategy": "steps", "eval_steps": 3}
SAME_RUN = {
    "defaults": {},
    "sequential": {"train_sampling_strategy": "sequential", "num_train_epochs": 1},
    "max_steps": {"max_steps": 5, "logging_steps": 2, "logging_first_step": True},
    "part_of_an_epoch": {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3, "logging_steps": 3},
    "data_seed": {"data_seed": 7, "seed": 3},
    "drop_last": {"dataloader_drop_last": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "max_steps": 2},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", "dataloader_drop_last": True},
    "log_per_epoch": {"logging_strategy": "epoch"},
    "warmup_share": {"warmup_steps": 0.3, "lr_scheduler_type": "cosine"},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-4}},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "stable_decay": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    "constant": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}} | EVAL,
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-3},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 1e-3, "adam_epsilon": 1e-5},
    "betas": {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-4, "optim": "adamw_torch"},
    "clip_hard": {"max_grad_norm": 0.1},
    "no_clip": {"max_grad_norm": 0.0},
    "smoothing": {"label_smoothing_factor": 0.2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "tokens_all": {"include_num_input_tokens_seen": True},
    "tokens_real": {"include_num_input_tokens_seen": "non_padding", "logging_steps": 3},
    "evaluation": EVAL | {"eval_delay": 2, "eval_on_start": True, "include_num_input_tokens_seen": "all"},
    "noise": {"neftune_noise_alpha": 5.0},
}
if not hasattr(transformers.trainer_pt_utils, "BatchRebalanceSampler"):
    del SAME_RUN["batch_rebalance"]


@pytest.mark.parametrize("case", SAME_RUN)
def test_runs_equal_transformers(case, tmp_path):
    trainers = []
    for kind in ("theirs", "ours"):
        data = {"eval_dataset": tiny_rows(10, seed=1)} if "eval_strategy" in SAME_RUN[case] else {}
        trainer = make(kind, tmp_path / kind, **SAME_RUN[case], **data)
        trainer.result = trainer.train()
        trainers.append(trainer)
    theirs, ours = trainers
    assert_same_run(ours, theirs, rel=1e-3 if case == "bf16" else 1e-5 if case == "noise" else 1e-6)
    assert ours.result.global_step == theirs.result.global_step
    assert ours.result.training_loss == pytest.approx(theirs.result.training_loss, rel=1e-6)
    assert set(ours.result.metrics) == set(theirs.result.metrics)
    for field in ("epoch", "max_steps", "num_train_epochs", "total_flos", "train_batch_size", "num_input_tokens_seen"):
        assert getattr(ours.state, field) == getattr(theirs.state, field), field


def test_optimizer_groups_are_those_of_transformers(tmp_path):
    ours, theirs = make("ours", tmp_path, model=tiny_model("gpt2")), make("theirs", tmp_path, model=tiny_model("gpt2"))
    sizes = [
        [(p.shape, g["weight_decay"]) for g in t.create_optimizer().param_groups for p in g["params"]]
        for t in (ours, theirs)
    ]
    assert sizes[0] == sizes[1] and {decay for _, decay in sizes[0]} == {0.0, 0.1}


def test_given_optimizer_and_class(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    before = model.lm_head.weight.detach().clone()
    trainer = make("ours", tmp_path, model=model, optimizers=(optimizer, schedule), max_steps=3, max_grad_norm=0.0)
    trainer.train()
    assert [entry["learning_rate"] for entry in trainer.state.log_history[:3]] == [0.25, 0.25, 0.5]
    assert not torch.equal(before, model.lm_head.weight)
    by_class = make("ours", tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}))
    assert type(by_class.create_optimizer()) is torch.optim.Adagrad
    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs"):
        make("ours", tmp_path, optimizers=(optimizer, None), optimizer_cls_and_kwargs=(torch.optim.Adagrad, {}))


def test_loss_function_of_the_user(tmp_path):
    def scaled(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 3 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    runs = [make(kind, tmp_path / kind, compute_loss_func=scaled) for kind in ("ours", "theirs")]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)


class TokenTrainer(Trainer):
    """Next-token loss on token batches, through ordinary logits."""

    def compute_loss(self, model, inputs: TokenBatch, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        logits = outputs.logits.flatten(0, 1)[inputs.source]
        losses = torch.nn.functional.cross_entropy(logits, inputs.targets, reduction="none")
        loss = losses.sum() / (num_items_in_batch or inputs.num_scored)
        self.metrics.mean("entropy", losses.sum(), inputs.num_scored)
        self.metrics.tokens(inputs.num_tokens)
        return (loss, outputs) if return_outputs else loss


def token_trainer(tmp_path, **options):
    return make("ours", tmp_path, cls=TokenTrainer, data_collator=TokenCollator(pad_token_id=0, flat=False), **options)


def test_token_batches_read_from_arrow_equal_dictionaries(tmp_path):
    ours, theirs = token_trainer(tmp_path / "a"), make("theirs", tmp_path / "b")
    ours.train(), theirs.train()
    assert_same_values(ours, theirs, ("loss", "grad_norm", "learning_rate", "epoch", "train_loss"))
    total = sum(len(row) for row in tiny_rows()["input_ids"])
    assert history(ours)[-2]["num_tokens"] == 2 * total
    assert "num_tokens" not in history(ours)[-1]  # nothing was left to log


def test_token_budget_changes_micro_batches_but_not_the_loss(tmp_path):
    sizes = []

    class Counting(TokenTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            sizes.append(inputs.input_ids.numel())
            return super().training_step(model, inputs, num_items_in_batch)

    collator = TokenCollator(pad_token_id=0, flat=False)
    plain = token_trainer(tmp_path / "a")
    budget = make("ours", tmp_path / "b", cls=Counting, data_collator=collator, token_budget=26)
    plain.train(), budget.train()
    assert max(sizes) <= 26 and len(sizes) > plain.state.global_step * 2
    assert_same_values(budget, plain, ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "train_loss"))


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    runs = []
    for batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(make("ours", tmp_path, **sizes))
        runs[-1].train()
    for run in runs[1:]:
        assert_same_values(run, runs[0], ("loss", "grad_norm", "train_loss"))


def test_mean_losses_are_averaged_over_micro_batches(tmp_path):
    class Means(TokenTrainer):
        loss_is_normalized = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs)  # its own mean

    model = tiny_model()
    trainer = make(
        "ours",
        tmp_path,
        cls=Means,
        model=copy.deepcopy(model),
        max_steps=1,
        data_collator=TokenCollator(pad_token_id=0, flat=False),
        train_sampling_strategy="sequential",
    )
    trainer.train()
    rows = tiny_rows()
    with torch.no_grad():
        halves = [model(**pad_rows([rows[i] for i in part])).loss.item() for part in (range(3), range(3, 6))]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(halves) / 2, rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("form", ["torch", "datasets"])
def test_streams(form, tmp_path):
    rows = tiny_rows()
    source = {"torch": lambda: Stream(rows), "datasets": lambda: rows.to_iterable_dataset(num_shards=2)}[form]
    runs = [make(kind, tmp_path, train=source(), max_steps=6) for kind in ("ours", "theirs")]
    for trainer in runs:
        trainer.train()
    # transformers leaves a short last window of a stream without an update; we take the step
    for mine, reference in zip(history(runs[0])[:3], history(runs[1])[:3], strict=True):
        assert mine == pytest.approx(reference, rel=1e-6)
    assert runs[0].state.global_step == 6
    with pytest.raises(ValueError, match="max_steps"):
        make("ours", tmp_path, train=source())


def test_torch_datasets_and_own_loaders(tmp_path):
    rows = tiny_rows()

    class Listed(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index] | {"unused": "text"}

    class Own(Trainer):
        def get_train_dataloader(self):
            return DataLoader(Listed(), batch_size=3, collate_fn=pad_rows)

    plain = make("ours", tmp_path)
    listed, own = make("ours", tmp_path, train=Listed()), make("ours", tmp_path, cls=Own)
    ordered = make("ours", tmp_path, train_sampling_strategy="sequential")
    for trainer in (plain, listed, own, ordered):
        trainer.train()
    assert_same_run(listed, plain)
    assert_same_run(own, ordered)


def test_resumed_run_continues_log_and_weights(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "include_num_input_tokens_seen": "all"}
    whole = token_trainer(tmp_path, **options)
    whole.train()
    resumed = token_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(resumed)[:-1] == history(whole)[:-1]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0
    left_out = token_trainer(tmp_path / "b", **options, ignore_data_skip=True)
    left_out.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(left_out)[-2]["loss"] != history(whole)[-2]["loss"]


def test_resumed_stream_continues_in_its_pass(tmp_path):
    options = {"train": tiny_rows().to_iterable_dataset(), "max_steps": 10, "save_strategy": "steps", "save_steps": 1}
    whole = make("ours", tmp_path, **options)  # four steps a pass
    whole.train()
    for step in (2, 4, 6):
        resumed = make("ours", tmp_path / str(step), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert history(resumed)[:-1] == history(whole)[:-1]
        assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_non_finite_loss_stops_before_the_update(tmp_path):
    class Breaks(TokenTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss * float("nan") if self.state.global_step == 3 else loss

    options = {"cls": Breaks, "data_collator": TokenCollator(pad_token_id=0, flat=False)}
    options |= {"save_strategy": "steps", "save_steps": 2}
    trainer = make("ours", tmp_path, **options)
    with pytest.raises(FloatingPointError, match=r"Step 4.*checkpoint-2.*learning_rate"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert trainer.state.global_step == 3
    onward = make("ours", tmp_path / "b", logging_nan_inf_filter=False, **options)
    onward.train()
    assert onward.state.log_history[3]["loss"] != onward.state.log_history[3]["loss"]  # NaN, as asked for


def test_batch_size_is_lowered_until_it_fits(tmp_path):
    class Small(TokenTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if inputs.num_segments > 4 and model.training:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    trainer = make("ours", tmp_path, cls=Small, data_collator=TokenCollator(pad_token_id=0, flat=False), **options)
    trainer.train()
    assert trainer.state.train_batch_size == trainer._train_batch_size <= 4
    assert trainer.state.global_step == -(-22 // (2 * trainer._train_batch_size))
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer.state.save_to_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    assert starting_batch_size(trainer.args, 8, str(tmp_path / "checkpoint-1")) == trainer._train_batch_size


def test_noise_of_flat_batches_follows_each_sequence():
    from fastalign.loop.model_setup import add_embedding_noise

    model = tiny_model().train()
    rows = tiny_rows(3)
    batch = TokenCollator(pad_token_id=0)([rows[i] for i in range(3)])
    clean = model.get_input_embeddings()(batch.input_ids)
    handle = add_embedding_noise(model, 5.0, lambda: batch)
    noise = (model.get_input_embeddings()(batch.input_ids) - clean).abs()
    handle.remove()
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        bound = 5.0 / ((stop - start).item() * clean.shape[-1]) ** 0.5
        assert 0.8 * bound < noise[start:stop].max() <= bound * (1 + 1e-5)
    assert torch.equal(model.get_input_embeddings()(batch.input_ids), clean)


def test_training_twice_goes_on_with_the_weights(tmp_path):
    trainer = make("ours", tmp_path, num_train_epochs=1)
    first = trainer.train().training_loss
    second = trainer.train().training_loss
    assert second < first - 0.2 and trainer.state.global_step == 4


def test_trainers_of_one_process_keep_their_precision(tmp_path):
    alone = make("ours", tmp_path, bf16=True, max_steps=2)
    alone.train()
    mixed = make("ours", tmp_path, bf16=True, max_steps=2)
    full = make("ours", tmp_path, max_steps=2, eval_dataset=tiny_rows(4, 1))
    full.evaluate()
    mixed.train()
    full.train()
    assert_same_run(mixed, alone)
    assert history(full)[1]["loss"] != history(alone)[0]["loss"]
    args = [make("ours", tmp_path, bf16=bf16).args for bf16 in (True, False)]
    for settings, expected in zip(args[::-1], ("no", "bf16"), strict=True):  # configs made before the trainers
        assert Trainer(tiny_model(), settings).accelerator.mixed_precision == expected


@pytest.mark.parametrize(
    ("kind", "kwargs"), [("linear", {"num_cyles": 2}), ("warmup_stable_decay", {}), ("cosine_with_min_lr", {})]
)
def test_arguments_of_schedules_are_checked(kind, kwargs, tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        make("ours", tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs).train()


def test_hyperparameter_search_is_refused_by_name(tmp_path):
    trainer = make("ours", tmp_path)
    with pytest.raises(NotImplementedError, match="hyperparameter_search"):
        trainer.hyperparameter_search(n_trials=2)
    with pytest.raises(NotImplementedError, match="hyperparameter_search"):
        trainer.train(trial={"learning_rate": 1e-3})
