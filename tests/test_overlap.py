"""Sampling ahead: which weights sample what, checkpoints, what runs beside what, the thread's errors and its end."""

import copy
import shutil
import signal
import threading
import time

import pytest
import torch
from datasets import IterableDataset
from grpo_runs import LONGEST, grpo_trainer, length_reward, prompts
from peft import LoraConfig, get_peft_model
from test_grpo import SAMPLED, assert_same, history, logged
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback

import fastalign
from fastalign.rollout.engine import Request, Sampling
from fastalign.rollout.loader import BatchPlan, prompt_order
from fastalign.rollout.native import NativeEngine
from fastalign.rollout.overlap import Ahead, StoppableEngine
from fastalign.rollout.own_weights import OwnWeightsEngine

AHEAD = SAMPLED | {"max_staleness": 1, "max_steps": 5}


class Weights(TrainerCallback):
    """What the weights were after each step."""

    def __init__(self):
        self.at = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.at[0] = copy.deepcopy(model.state_dict())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = copy.deepcopy(model.state_dict())


def recorded(trainer):
    """The samples of each generation batch as they are learned from, and their staleness."""
    found = {}
    make = trainer.get_train_dataloader

    def get():
        loader = make()
        take = trainer.ahead.take

        def watch(number, *given):
            found[number] = take(number, *given)
            return found[number]

        trainer.ahead.take = watch
        return loader

    trainer.get_train_dataloader = get
    return found


# Which weights sample


@pytest.mark.parametrize("depth, uses", [(1, 1), (2, 1), (1, 2)])
def test_each_batch_is_sampled_from_the_weights_that_the_schedule_names(depth, uses, tmp_path):
    """By hand: batch k from the weights at the moment that batch k - depth is first learned from."""
    weights = Weights()
    config = AHEAD | {
        "max_staleness": depth,
        "num_iterations": uses,
        "max_steps": 5 * uses,
        "dataloader_num_workers": 0,
    }
    trainer = grpo_trainer(tmp_path, callbacks=[weights], **config)
    found = recorded(trainer)
    trainer.train()
    assert list(found) == [0, 1, 2, 3, 4]
    model, plan, order = tiny_model(), BatchPlan.of_training(trainer.args, 0, 1), prompt_order(24, 42, 0)
    for number, made in found.items():
        step = max(number - depth, 0) * uses
        assert {sample.version for sample in made.samples} == {step}
        model.load_state_dict(weights.at[step])
        trainer.rollouts.engine = NativeEngine(model)
        rows = [trainer.train_dataset[int(i)] for i in order[2 * number : 2 * number + 2]]
        by_hand = trainer._sample(plan, rows, number, None).samples
        assert [one.completion_ids for one in made.samples] == [one.completion_ids for one in by_hand]
        assert [one.logps for one in made.samples] == [pytest.approx(one.logps, abs=1e-5) for one in by_hand]


def test_updates_are_those_of_the_same_samples_given_by_hand(tmp_path, monkeypatch):
    """A synchronous run on the recorded samples, corrected by their log-probabilities, logs the same numbers."""
    trainer = grpo_trainer(tmp_path, **AHEAD)
    found = recorded(trainer)
    ours = history(trainer)
    assert [line["sampling/staleness"] for line in ours[:-1]] == [0, 1, 1, 1, 1]
    assert all(line["sampling/sampling_logp_difference/mean"] > 1e-3 for line in ours[1:-1])
    made = iter(found.values())

    def given(prompts, trainer):
        samples = next(made).samples
        return {
            "prompt_ids": [one.prompt_ids for one in samples],
            "completion_ids": [one.completion_ids for one in samples],
            "logprobs": [one.logps for one in samples],
        }

    monkeypatch.setattr(fastalign.GRPOConfig, "corrects", True)
    theirs = history(grpo_trainer(tmp_path, rollout_func=given, max_steps=5, max_completion_length=6))
    for line in ours:
        line.pop("sampling/staleness", None)
    assert_same(ours, theirs)


def test_without_updates_between_them_ahead_is_as_one_after_the_other(tmp_path):
    keys = ("reward", "reward_std", "completions/mean_length", "num_tokens", "entropy")
    still = {"learning_rate": 0.0, "max_steps": 15}  # over the end of an epoch of 12 batches
    for depth in (1, 3):
        ours = history(grpo_trainer(tmp_path, **AHEAD | still | {"max_staleness": depth}), keys)
        assert_same(ours, history(grpo_trainer(tmp_path, **SAMPLED | still), keys))


def test_streams_are_sampled_ahead(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(prompts()))
    runs = [history(grpo_trainer(tmp_path, **AHEAD, shuffle_dataset=False, data=data)) for data in (prompts(), stream)]
    keys = ("loss", "grad_norm", "reward", "sampling/staleness")
    assert_same(*[[{k: e[k] for k in keys if k in e} for e in run] for run in runs])


# The copy


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_copy_shares_nothing_that_is_trained(kind):
    model = tiny_model()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    prompt = tiny_tokenizer()(text="the quick brown")["input_ids"]
    requests = [Request(i, prompt, Sampling(8), seed=i) for i in range(4)]

    def ids(engine):
        engine.submit(requests)
        found = {}
        while engine.pending:
            found |= {one.key: one.ids for one in engine.step()}
        return found

    engine = OwnWeightsEngine(model)
    before = ids(engine)
    assert before == ids(NativeEngine(model))
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    own = list(engine.weights.model.parameters())
    assert not trained.keys() & {id(p) for p in own} and not any(p.requires_grad for p in own)
    memory = {p.data_ptr() for p in trained.values()}
    assert not memory & {p.data_ptr() for p in own}
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in own}
    assert len(shared) == (0 if kind == "full" else len({p.data_ptr() for p in model.parameters()} - memory))
    kept = engine.weights.snapshot()
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.3 * torch.randn_like(parameter)
    assert ids(engine) == before
    report = engine.sync(7)
    sizes = sum(p.numel() * p.element_size() for p in trained.values())
    assert (report.way, report.num_bytes, engine.version) == ("in place", sizes, 7)
    assert ids(engine) == ids(NativeEngine(model)) != before
    engine.sync(8, kept)
    assert ids(engine) == before


def test_weights_that_are_unfrozen_later_are_refused():
    model = tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    engine = OwnWeightsEngine(model)
    engine.sync(1)
    assert not model.get_input_embeddings().weight.requires_grad
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        engine.sync(2)


def test_sampling_in_the_thread_leaves_dropout_alone(tmp_path):
    """Random numbers of training are those of a run whose samples are there already."""
    config = AHEAD | {"max_steps": 3, "peft_config": LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"])}
    runs = [history(grpo_trainer(tmp_path, **config), ("loss", "grad_norm", "reward")) for _ in range(2)]
    assert runs[0] == runs[1]


# Checkpoints


@pytest.mark.parametrize("depth, step", [(1, 1), (1, 2), (2, 3)])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(depth, step, tmp_path):
    """Batches that were begun are kept: the log and the weights are the same, no prompt is skipped or taken twice."""
    config = AHEAD | {"max_staleness": depth, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
    config |= {"steps_per_generation": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    config |= {"max_steps": 6, "num_iterations": 2}
    seen = []

    def counted(prompts, completion_ids, log_extra, log_metric, **kwargs):
        seen.extend(prompts)
        log_extra("first", [ids[0] for ids in completion_ids])
        log_metric("tokens", float(sum(map(len, completion_ids))))
        return length_reward(completion_ids, **kwargs)

    whole = grpo_trainer(tmp_path / "whole", rewards=counted, **config)
    expected, all_prompts = history(whole), sorted(seen)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    taken_before = recorded_numbers(step)
    seen.clear()
    again = grpo_trainer(tmp_path / "again", rewards=counted, **config)
    again.train(resume_from_checkpoint=True)
    assert logged(again)[:-1] == expected[:-1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    begun = min(taken_before + depth, 3)  # of 3 generation batches, 8 completions each
    assert len(all_prompts) == 3 * 8 and len(seen) == (3 - begun) * 8
    assert all(all_prompts.count(prompt) >= seen.count(prompt) for prompt in seen)


def recorded_numbers(step: int) -> int:
    """Generation batches that are asked for in so many steps of 3 micro-batches, of 8 to a generation."""
    return -(-3 * step // 8)


# Evaluation


def test_evaluation_between_batches_changes_nothing(tmp_path):
    keys = ("loss", "grad_norm", "reward", "sampling/staleness")
    plain = history(grpo_trainer(tmp_path, **AHEAD | {"max_staleness": 2}), keys)
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(2)}
    trainer = grpo_trainer(tmp_path, **AHEAD | {"max_staleness": 2}, **options)
    lines = history(trainer)
    assert [{k: e[k] for k in keys} for e in lines if "loss" in e] == plain
    weights = trainer.rollouts.engine.weights
    with torch.no_grad():  # the last evaluation was of the last weights
        assert all(torch.equal(a, b) for a, b in weights._pairs)


# The thread


class Slow:
    """Rewards that take their time, and note when."""

    def __init__(self, seconds):
        self.seconds, self.spans = seconds, []

    def __call__(self, completion_ids, **kwargs):
        start = time.monotonic()
        time.sleep(self.seconds)
        self.spans.append((start, time.monotonic()))
        return length_reward(completion_ids, **kwargs)

    __name__ = "slow"


def test_slow_sampling_and_slow_rewards_are_hidden_behind_updates(tmp_path, monkeypatch):
    """Each step sleeps 0.2 s in sampling, 0.2 s in rewards and 0.2 s in the update: together 0.6, overlapped less."""
    step = NativeEngine.step

    def slow_step(self):
        time.sleep(0.2 / 8)
        self.tokens_per_step = 1
        return step(self)

    monkeypatch.setattr(NativeEngine, "step", slow_step)

    class Wait(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.4)

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.monotonic())

    spans = {}
    for depth in (0, 1):
        wait = Wait()
        config = SAMPLED | {"max_steps": 5, "max_completion_length": 8, "max_staleness": depth}
        grpo_trainer(tmp_path, rewards=Slow(0.05), callbacks=[wait], **config).train()
        spans[depth] = wait.seconds[-1] - wait.seconds[0]
    assert spans[1] < spans[0] - 0.4, spans


def test_rewards_that_need_the_main_thread_get_it(tmp_path):
    threads = []

    def alarmed(completion_ids, **kwargs):
        threads.append(threading.current_thread())
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return length_reward(completion_ids, **kwargs)

    lines = history(grpo_trainer(tmp_path, rewards=alarmed, **AHEAD), ("rewards/alarmed/mean", "loss"))
    assert threads[-1] is threading.main_thread() and threads[0] is not threads[-1]
    assert all("rewards/alarmed/mean" in line for line in lines[:-1])


def test_errors_of_the_thread_end_the_run_where_its_batch_is_asked_for(tmp_path, monkeypatch):
    step = NativeEngine.step

    def breaks(self):
        if self.version == 2:
            raise OSError("the engine is gone")
        return step(self)

    monkeypatch.setattr(NativeEngine, "step", breaks)
    trainer = grpo_trainer(tmp_path, **AHEAD | {"save_strategy": "steps", "save_steps": 1})
    with pytest.raises(OSError, match="the engine is gone"):
        trainer.train()
    assert trainer.state.global_step == 3  # batch 3 was sampled from the weights of step 2, while step 3 was made
    assert (tmp_path / "checkpoint-3").is_dir()
    assert no_thread()
    monkeypatch.setattr(NativeEngine, "step", step)
    again = grpo_trainer(tmp_path, **AHEAD)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def no_thread() -> bool:
    return not any(thread.name == "sampling ahead" for thread in threading.enumerate())


def test_an_interrupt_while_it_waits_ends_sampling_at_once(tmp_path, monkeypatch):
    step = NativeEngine.step
    slow = threading.Event()

    def endless(self):
        if self.version == 1:
            slow.set()
            time.sleep(0.02)
            return []
        return step(self)

    monkeypatch.setattr(NativeEngine, "step", endless)
    main = threading.main_thread().ident

    def interrupt():
        slow.wait(60)
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    trainer = grpo_trainer(tmp_path, **AHEAD)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert no_thread() and trainer.state.global_step == 2 and not trainer.engine.pending
    monkeypatch.setattr(NativeEngine, "step", step)
    trainer.train()  # the trainer can be used again
    assert trainer.state.global_step == 5 and no_thread()


def test_a_thread_that_cannot_be_stopped_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr("fastalign.rollout.overlap.PATIENCE", 0.05)
    began, go = threading.Event(), threading.Event()

    class Engine:
        def sync(self, step):
            pass

    class State:
        global_step = 0

    ahead = Ahead(StoppableEngine(Engine()), lambda *given: (began.set(), go.wait(30)), 1, lambda: State)
    ahead._begin(0, [])
    began.wait(30)
    ahead.close()
    assert "left behind" in caplog.text
    go.set()


# Errors

BAD = {
    "below zero": ({"max_staleness": -1}, "at least 0"),
    "no correction": ({"max_staleness": 1, "vllm_importance_sampling_correction": False}, "need it"),
    "vLLM in this process": ({"max_staleness": 1, "use_vllm": True}, "vllm_mode='server'"),
    "continuous batching": ({"max_staleness": 1, "use_transformers_continuous_batching": True}, "embedded engine"),
    "server": ({"max_staleness": 2, "use_vllm": True, "vllm_mode": "server"}, "Set it to 1"),
    "part of the vocabulary": ({"max_staleness": 1, "top_k": 5}, "bias the importance sampling"),
    "functions": ({"max_staleness": 1, "fixed": True}, "rollout_func"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_sampled_ahead_is_refused(case, tmp_path):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **{"fixed": False, "max_completion_length": LONGEST} | options)
