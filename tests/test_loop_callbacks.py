"""Callbacks see and steer the loop as they do transformers' Trainer."""

import pytest
import torch
import transformers
from tiny_training import assert_same_run, assert_same_values, make, tiny_rows, weights

from fastalign.loop import Trainer

EVAL = {"eval_strategy": "steps", "eval_steps": 3}


class Recorder(transformers.TrainerCallback):
    """Writes down every event, the step and what came with it."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):

            def record(args, state, control, **kwargs):
                given = sorted(k for k, v in kwargs.items() if v is not None)
                flags = [f for f in ("should_log", "should_evaluate", "should_save") if getattr(control, f)]
                self.events.append((name, state.global_step, round(state.epoch or 0, 6), given, flags))

            return record
        return super().__getattribute__(name)


def test_callbacks_get_the_same_events_in_the_same_order(tmp_path):
    events = []
    for kind in ("ours", "theirs"):
        recorder = Recorder()
        trainer = make(
            kind,
            tmp_path / kind,
            callbacks=[recorder],
            eval_dataset=tiny_rows(6, 1),
            save_strategy="steps",
            save_steps=4,
            logging_steps=3,
            **EVAL,
        )
        trainer.train()
        trainer.predict(tiny_rows(5, 2))
        events.append(recorder.events)
    assert events[0] == events[1]
    assert {name for name, *_ in events[0]} >= {"on_init_end", "on_substep_end", "on_optimizer_step", "on_save"}


class StopAfter(transformers.TrainerCallback):
    def __init__(self, step, flag):
        self.step, self.flag = step, flag

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)


@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_callbacks_can_stop(flag, tmp_path):
    runs = [make(kind, tmp_path, callbacks=[StopAfter(2, flag)]) for kind in ("ours", "theirs")]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)


class AtSubstep(transformers.TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_substep_end(self, args, state, control, **kwargs):
        self.act(state, control)


def test_step_that_is_stopped_half_way_leaves_no_gradients_and_no_loss(tmp_path):
    stops = []

    def stop(state, control):
        if state.global_step == 1 and not stops:
            stops.append(state.epoch)
            control.should_epoch_stop = True

    data = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "lr_scheduler_type": "constant"}
    stopped = make("ours", tmp_path, callbacks=[AtSubstep(stop)], **data)
    plain = make("ours", tmp_path, callbacks=[StopAfter(1, "should_epoch_stop")], **data)
    for trainer in (stopped, plain):
        trainer.train()
    assert_same_values(stopped, plain, ("loss", "grad_norm", "train_loss"))
    assert all(torch.equal(weights(plain)[name], value) for name, value in weights(stopped).items())


def test_callbacks_may_evaluate_amid_a_step(tmp_path):
    modes = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            modes.append((model.training, num_items_in_batch is not None))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    act = lambda state, control: trainer.evaluate(tiny_rows(3, 1))  # noqa: E731
    trainer = make("ours", tmp_path, cls=Watched, callbacks=[AtSubstep(act)], max_steps=2)
    trainer.train()
    assert set(modes) == {(True, True), (False, False)}


def test_hooks_that_the_loop_never_calls_are_named(tmp_path, caplog):
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

        def create_optimizer_and_scheduler(self, num_training_steps):
            raise AssertionError

        def evaluation_loop(self, *args, **kwargs):
            raise AssertionError

    make("ours", tmp_path, cls=Own)
    (message,) = [record.getMessage() for record in caplog.records if "overrides" in record.getMessage()]
    assert "Own overrides create_optimizer_and_scheduler, evaluation_loop of transformers.Trainer" in message
    caplog.clear()
    make("ours", tmp_path)
    assert "overrides" not in caplog.text


def test_callbacks_are_added_and_removed(tmp_path):
    trainer = make("ours", tmp_path)
    recorder = Recorder()
    trainer.add_callback(recorder)
    assert trainer.pop_callback(Recorder) is recorder and trainer.pop_callback(Recorder) is None
    trainer.add_callback(Recorder)
    trainer.remove_callback(Recorder)
    assert not any(isinstance(callback, Recorder) for callback in trainer.callback_handler.callbacks)


def test_best_model_and_early_stopping(tmp_path):
    runs = []
    for kind in ("theirs", "ours"):
        stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        options |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.3, "num_train_epochs": 4}
        trainer = make(kind, tmp_path / kind, eval_dataset=tiny_rows(8, 1), callbacks=[stop], **options)
        trainer.train()
        runs.append(trainer)
    theirs, ours = runs
    assert_same_run(ours, theirs)
    assert ours.state.best_metric == theirs.state.best_metric and ours.state.global_step < ours.state.max_steps
    assert ours.state.best_global_step == theirs.state.best_global_step
    left = [sorted(path.name for path in (tmp_path / kind).glob("checkpoint-*")) for kind in ("ours", "theirs")]
    assert left[0] == left[1] == [f"checkpoint-{ours.state.best_global_step}"]


def test_save_strategy_best(tmp_path):
    options = {"save_strategy": "best", "metric_for_best_model": "loss", "learning_rate": 0.3} | EVAL
    for kind in ("ours", "theirs"):
        make(kind, tmp_path / kind, eval_dataset=tiny_rows(8, 1), **options).train()
    saved = [sorted(path.name for path in (tmp_path / kind).glob("checkpoint-*")) for kind in ("ours", "theirs")]
    assert saved[0] == saved[1] != []
