"""Callbacks see and steer the loop as they do transformers' Trainer."""

import pytest
import transformers
from tiny_training import assert_same_run, make, tiny_rows

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
