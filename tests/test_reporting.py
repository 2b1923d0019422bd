"""What a run tells: progress bar, model card, uploads, memory, files."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_tokenizer
from tiny_training import make, tiny_rows

from fastalign.loop import hub
from fastalign.loop.progress import TrainingProgress


def test_progress_bar_shows_loss_speed_and_time(tmp_path, capsys):
    make(
        "ours", tmp_path, disable_tqdm=False, include_num_input_tokens_seen="all", eval_dataset=tiny_rows(4, 1)
    ).train()
    shown = capsys.readouterr()
    assert "8/8" in shown.err and "loss=4.8" in shown.err and "tokens/s=" in shown.err
    assert f"results are in {tmp_path}" in shown.out + shown.err


def test_display_follows_disable_tqdm(tmp_path):
    def displays(trainer):
        kinds = (TrainingProgress, transformers.PrinterCallback)
        return [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, kinds)]

    assert displays(make("ours", tmp_path, disable_tqdm=True)) == [transformers.PrinterCallback]
    assert displays(make("ours", tmp_path, disable_tqdm=False)) == [TrainingProgress]


def test_saved_model_loads_with_its_tokenizer_and_state(tmp_path):
    trainer = make("ours", tmp_path, processing_class=tiny_tokenizer(), max_steps=1)
    result = trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    trainer.log_metrics("train", result.metrics)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1
    assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"] == result.training_loss
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).max_steps == 1


def test_model_card_says_what_was_done(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "org/start"
    trainer = make("ours", tmp_path / "run", model=model, max_steps=2, hub_model_id="me/result")
    trainer.train()
    trainer.create_model_card(dataset_name="org/data", tags="extra")
    card = (tmp_path / "run" / "README.md").read_text()
    header = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert json.loads(header["base_model"]) == "org/start" and json.loads(header["datasets"]) == ["org/data"]
    assert json.loads(header["tags"]) == ["fastalign", "extra"]
    last = trainer.state.log_history[-1]
    assert "# result" in card and f"| train_loss | {last['train_loss']:.5g} |" in card
    assert "| learning_rate | 0.01 |" in card and "| examples per optimizer step | 6 |" in card


class FakeHub:
    """Stands for huggingface_hub.HfApi: notes what would be uploaded."""

    calls: ClassVar[list] = []

    def create_repo(self, name, **kwargs):
        self.calls.append(("create", name, kwargs))
        return SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}")

    def upload_folder(self, **kwargs):
        self.calls.append(("upload", kwargs["folder_path"], kwargs))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True) if kwargs["run_as_future"] else "commit"


@pytest.fixture
def fake_hub(monkeypatch):
    FakeHub.calls = []
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    return FakeHub


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_uploads_follow_the_hub_strategy(strategy, tmp_path, fake_hub):
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/run", "hub_private_repo": True}
    options |= {"hub_token": "secret", "hub_revision": "dev", "save_strategy": "steps", "save_steps": 4}
    trainer = make("ours", tmp_path, hub_always_push=True, **options)
    trainer.train()
    created, *uploads = fake_hub.calls
    assert created == ("create", "me/run", {"token": "secret", "private": True, "exist_ok": True})
    targets = [options.get("path_in_repo") for _, _, options in uploads]
    per_checkpoint = {"end": [], "every_save": [None], "checkpoint": [None, "last-checkpoint"]}
    expected = per_checkpoint.get(strategy, []) * 2
    if strategy == "all_checkpoints":
        expected = [None, "checkpoint-4", None, "checkpoint-8"]
    assert targets == expected
    if strategy == "every_save":
        assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "training_args.bin").is_file()
    assert trainer.push_to_hub("done") == "commit"
    _, folder, last = fake_hub.calls[-1]
    assert folder == str(tmp_path) and last["commit_message"] == "done" and last["revision"] == "dev"
    assert last["repo_id"] == "me/run" and last["token"] == "secret" and "checkpoint-*" in last["ignore_patterns"]
    assert (tmp_path / "README.md").is_file()
    count = len(fake_hub.calls)
    trainer.save_model()
    assert fake_hub.calls[count][2]["commit_message"] == "Model save"


def test_memory_is_measured_on_request(tmp_path):
    measured = make("ours", tmp_path, skip_memory_metrics=False, max_steps=1).train().metrics
    assert {"init_mem_cpu_alloc_delta", "train_mem_cpu_alloc_delta", "before_init_mem_cpu"} <= set(measured)
    assert not any("mem" in key for key in make("ours", tmp_path, max_steps=1).train().metrics)


def test_report_to_and_its_fields(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make("ours", tmp_path, report_to=["tensorboard"], max_steps=2).train()
    assert list((tmp_path / "board").rglob("events.*"))
