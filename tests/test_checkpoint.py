"""Checkpoints: their layout, what recognises a broken or foreign one, and exchange with TRL and Transformers."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from loop_runs import history, rows, trainer
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.loop import checkpoint, checkpoint_files, weights
from fastalign.loop.checkpoint import CheckpointError, find_last_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    made = trainer(tmp_path_factory.mktemp("finished") / "run", max_steps=3)
    made.train()
    return made


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of its output that a test may spoil."""
    return shutil.copytree(finished.args.output_dir, tmp_path / "run")


def weights_of(made):
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_layout_loads_in_transformers(finished):
    path = Path(finished.args.output_dir) / "checkpoint-3"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert_same(model.state_dict(), weights_of(finished))
    assert AutoTokenizer.from_pretrained(path)("hello").input_ids == tiny_tokenizer()("hello").input_ids
    state = json.loads((path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3] and state["global_step"] == 3
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    mine = finished.optimizer.state_dict()
    for index, values in mine["state"].items():
        assert torch.equal(values["exp_avg"], saved["state"][index]["exp_avg"])
    assert (path / "model.safetensors").stat().st_mode & 0o777 == path.stat().st_mode & 0o666
    assert not list(path.parent.glob("tmp-*"))


@pytest.mark.parametrize(("family", "peft"), [("qwen3_moe", False), ("qwen2", False), ("llama", True)])
def test_resumed_run_equals_uninterrupted_run(family, peft, tmp_path):
    # a mixture of experts has other names in files than in memory, qwen2 ties its head, adapters are saved alone
    whole = trainer(tmp_path / "a", family=family, peft=peft, max_steps=3, logging_steps=2, save_steps=1)
    whole.train()
    again = trainer(tmp_path / "b", family=family, peft=peft, max_steps=3, logging_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert_same(weights_of(again), weights_of(whole))
    assert history(again.state)[:-1] == history(whole.state)[:-1]


def test_adapter_loads_in_peft(tmp_path):
    from peft import PeftModel

    made = trainer(tmp_path, peft=True, max_steps=1)
    made.train()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-1")
    assert_same(loaded.state_dict(), weights_of(made))
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_checkpoint_is_skipped_and_named(name, copied, tmp_path, caplog):
    file = copied / "checkpoint-3" / name
    os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        assert find_last_checkpoint(copied) == str(copied / "checkpoint-2")
    assert name in caplog.text and "checkpoint-3" in caplog.text
    made = trainer(copied, max_steps=4)
    before = weights_of(made)
    with pytest.raises(ValueError, match=f"checkpoint-3 cannot be used: {name} has .*checkpoint-2"):
        made.train(resume_from_checkpoint=str(copied / "checkpoint-3"))
    assert_same(weights_of(made), before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_truncated_checkpoint_without_manifest(name, copied):
    for folder in checkpoint_files.checkpoints(copied):
        (folder / checkpoint_files.MANIFEST).unlink()
    assert find_last_checkpoint(copied) == str(copied / "checkpoint-3")
    file = copied / "checkpoint-3" / name
    os.truncate(file, file.stat().st_size - 7)
    assert name in checkpoint_files.problem(file.parent)
    assert find_last_checkpoint(copied) == str(copied / "checkpoint-2")
    file.unlink()
    assert name.split(".")[0] in checkpoint_files.problem(file.parent) or "no weights" in checkpoint_files.problem(
        file.parent
    )


def test_missing_shard_is_named(tmp_path):
    folder = tmp_path / "checkpoint-1"
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "trainer_state.json").write_text("{}")
    assert checkpoint_files.problem(folder) is None
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert checkpoint_files.problem(folder) == f"{shard.name} is missing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_kwargs": {"hidden_size": 16}},
            r"of another shape \(.*embed_tokens.weight \(331, 32\) instead of \(331, 16\)",
        ),
        ({"model_kwargs": {"num_hidden_layers": 3}}, r"9 missing \(model.layers.2"),
        ({"family": "gpt2"}, r"missing \(transformer.wte.weight.*unknown \(lm_head.weight|unknown \("),
        ({"peft": True}, "adapter_model.safetensors"),
    ],
)
def test_foreign_checkpoint_is_refused(options, message, finished, tmp_path):
    path = Path(finished.args.output_dir) / "checkpoint-3"
    made = trainer(tmp_path, **options)
    before = weights_of(made)
    with pytest.raises(ValueError, match=message) as error:
        made.train(resume_from_checkpoint=str(path))
    assert str(path) in str(error.value) and "checkpoint-2" in str(error.value)
    assert_same(weights_of(made), before)


def test_full_disk(finished, copied, monkeypatch):
    made = trainer(copied, max_steps=5)
    real = torch.save

    def full(value, file, *args, **kwargs):
        if Path(file).name == "optimizer.pt":
            Path(file).write_bytes(b"cut")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*MB.*MB are free.*checkpoint-3") as error:
        made.train(resume_from_checkpoint=True)
    assert error.value.errno == errno.ENOSPC and "save_total_limit" in str(error.value)
    assert sorted(p.name for p in copied.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert made.state.global_step == 4
    monkeypatch.undo()
    path = checkpoint.save_checkpoint(made)  # there is space again: nothing was lost
    assert_same(load_file(Path(path) / "model.safetensors"), weights_of(made))


def test_rotation_keeps_newest_and_best(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.args.save_total_limit = 2
    made.state.best_global_step = 2
    for step in range(2, 6):
        made.state.global_step = step
        checkpoint.save_checkpoint(made)
    assert [path.name for path in checkpoint_files.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    with torch.no_grad():
        made.model.lm_head.weight.zero_()
    checkpoint.load_best_model(made)
    assert_same(weights_of(made), dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors")))


def test_second_save_of_a_step_replaces_it_and_a_kill_between_renames_is_repaired(copied):
    made = trainer(copied, max_steps=3)
    made.train(resume_from_checkpoint=str(copied / "checkpoint-2"))  # writes checkpoint-3 again
    final = copied / "checkpoint-3"
    assert checkpoint_files.problem(final) is None
    os.rename(final, copied / "tmp-checkpoint-3")  # as after the first of two renames
    shutil.copytree(copied / "checkpoint-2", copied / "tmp-old-checkpoint-3")
    shutil.copytree(copied / "checkpoint-2", copied / "tmp-checkpoint-9")
    os.truncate(copied / "tmp-checkpoint-9" / "optimizer.pt", 3)  # was being written
    (copied / "tmp-notes").mkdir()  # not ours
    path = checkpoint.checkpoint_to_resume(made, True)
    assert path == str(final) and checkpoint_files.problem(final) is None
    assert [p.name for p in copied.glob("tmp-*")] == ["tmp-notes"]
    assert_same(load_file(final / "model.safetensors"), weights_of(made))


def test_finished_run_makes_no_further_step(copied):
    path = copied / "checkpoint-3"
    made = trainer(copied, max_steps=3, lr_scheduler_type="constant")
    result = made.train(resume_from_checkpoint=str(path))
    assert result.global_step == made.state.global_step == 3
    assert_same(weights_of(made), dict(load_file(path / "model.safetensors")))


def test_resume_without_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_other_number_of_ranks_is_seeded_anew(finished, caplog):
    made, state = trainer(finished.args.output_dir), torch.get_rng_state()
    path = Path(finished.args.output_dir) / "checkpoint-2"
    checkpoint.load_rng_state(made, path)
    restored = torch.get_rng_state()
    assert torch.equal(restored, torch.load(path / "rng_state.pth", weights_only=False)["cpu"])
    os.rename(path / "rng_state.pth", path / "rng_state_0.pth")
    try:
        checkpoint.load_rng_state(made, path)
    finally:
        os.rename(path / "rng_state_0.pth", path / "rng_state.pth")
    assert "no random state for rank 0 of 1" in caplog.text
    assert not torch.equal(torch.get_rng_state(), restored)
    torch.set_rng_state(state)


def test_save_only_model_resumes_with_fresh_optimizer(tmp_path, caplog):
    made = trainer(tmp_path, max_steps=2, save_only_model=True)
    made.train()
    path = Path(find_last_checkpoint(tmp_path))
    assert not (path / "optimizer.pt").exists() and not list(path.glob("rng_state*"))
    again = trainer(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and "no optimizer state" in caplog.text


@pytest.mark.parametrize("peft", [False, True])
def test_exchange_with_trl(peft, tmp_path):
    trl = pytest.importorskip("trl")
    settings = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 4}
    settings |= {"learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"seed": 3, "gradient_accumulation_steps": 2, "disable_tqdm": True}

    def theirs(folder):
        made = trainer(folder, peft=peft)  # the same model, adapter included
        args = trl.SFTConfig(str(folder), **settings)
        return trl.SFTTrainer(made.model, args, train_dataset=rows(), processing_class=tiny_tokenizer())

    # dropout draws differ (padded rows there, flat rows here)
    def without_dropout(made):
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return made

    other = without_dropout(theirs(tmp_path / "trl"))
    other.train()
    mine = without_dropout(trainer(tmp_path / "mine", peft=peft, **settings))
    mine.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2"))
    assert_same(weights_of(mine), {k: v.clone() for k, v in other.model.state_dict().items()}, 1e-5)
    assert [e["step"] for e in mine.state.log_history[:4]] == [1, 2, 3, 4]
    tokens = [e["num_tokens"] for e in other.state.log_history[:4]]
    assert [e["num_tokens"] for e in mine.state.log_history[:4]] == tokens
    for a, b in zip(mine.state.log_history[:4], other.state.log_history[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    whole = without_dropout(trainer(tmp_path / "ours", peft=peft, **settings))
    whole.train()
    back = without_dropout(theirs(tmp_path / "back"))
    back.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert_same({k: v.clone() for k, v in back.model.state_dict().items()}, weights_of(whole), 1e-5)


def test_deepspeed_is_refused_before_training(tmp_path, monkeypatch):
    made = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(type(made.accelerator.state), "deepspeed_plugin", object())
    with pytest.raises(NotImplementedError, match="DeepSpeed"):
        made.train()
    assert made.state.global_step == 0


def test_callback_states_are_restored(tmp_path):
    from transformers import EarlyStoppingCallback

    made = trainer(tmp_path / "a", max_steps=1, restore_callback_states_from_checkpoint=True)
    made.train()
    stopping = [EarlyStoppingCallback(early_stopping_patience=n) for n in (5, 6)]
    for number, callback in enumerate(stopping):
        made.add_callback(callback)
        callback.early_stopping_patience_counter = 3 + number
    path = checkpoint.save_checkpoint(made)
    fresh = [EarlyStoppingCallback(early_stopping_patience=1) for _ in range(2)]
    for old, new in zip(stopping, fresh, strict=True):
        made.callback_handler.callbacks[made.callback_handler.callbacks.index(old)] = new
    checkpoint.load_checkpoint(made, path)
    assert [(c.early_stopping_patience, c.early_stopping_patience_counter) for c in fresh] == [(5, 3), (6, 4)]


def test_whole_tensors_pass_through():
    value = torch.arange(6.0).reshape(2, 3)
    assert weights.whole(value, True) is value and weights.like(value, value) is value
