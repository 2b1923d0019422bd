"""Every `TrainingArguments` field is honoured, and shown to be, or refused with its name."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from accelerate import PartialState
from tiny import tiny_model
from tiny_training import SETTINGS, assert_same_values, history, make, tiny_rows, weights
from transformers import TrainingArguments, training_args
from transformers.training_args import OptimizerNames

from fastalign.config import AlignConfig
from fastalign.loop import distributed, reporting, steps
from fastalign.loop import trainer as trainer_module
from fastalign.loop.arguments import REFUSED, honoured_fields

# test -> the fields that it shows to be honoured
SHOWN_BY = {
    "test_loop.py::test_runs_equal_transformers": """per_device_train_batch_size num_train_epochs max_steps
        gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
        weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor bf16
        gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha logging_strategy logging_steps
        logging_first_step eval_strategy eval_steps eval_delay eval_on_start include_num_input_tokens_seen data_seed
        train_sampling_strategy dataloader_drop_last""",
    "test_loop.py::test_resumed_run_continues_log_and_weights": "ignore_data_skip",
    "test_loop_callbacks.py::test_best_model_and_early_stopping": "load_best_model_at_end save_total_limit save_steps",
    "test_loop_callbacks.py::test_save_strategy_best": "save_strategy metric_for_best_model",
    "test_loop.py::test_non_finite_loss_stops_before_the_update": "logging_nan_inf_filter",
    "test_loop.py::test_batch_size_is_lowered_until_it_fits": "auto_find_batch_size",
    "test_evaluation.py::test_evaluate_equals_transformers": """bf16_full_eval label_names prediction_loss_only
        per_device_eval_batch_size eval_accumulation_steps""",
    "test_evaluation.py::test_predict_equals_transformers": "eval_do_concat_batches",
    "test_evaluation.py::test_metrics_in_batches_with_inputs_and_losses": "include_for_metrics batch_eval_metrics",
    "test_reporting.py::test_display_follows_disable_tqdm": "disable_tqdm",
    "test_reporting.py::test_report_to_and_its_fields": "report_to",
    "test_reporting.py::test_uploads_follow_the_hub_strategy": """push_to_hub hub_token hub_private_repo hub_model_id
        hub_strategy hub_always_push hub_revision""",
    "test_reporting.py::test_memory_is_measured_on_request": "skip_memory_metrics",
    "test_batching.py::test_loader_options_arrive": """dataloader_num_workers dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order""",
    "test_batching.py::test_lengths_of_shuffled_and_plain_datasets": "length_column_name",
    "test_batching.py::test_unused_columns": "remove_unused_columns",
    "test_patch.py::test_use_liger_kernel_means_ligers_layers": "use_liger_kernel liger_kernel_config",
    "test_fsdp_settings": "fsdp fsdp_config",
    "test_seeds_decide": "seed full_determinism",
    "test_folder_and_resume_field": "output_dir resume_from_checkpoint",
    "test_cache_is_emptied": "torch_empty_cache_steps",
    "test_model_settings": "use_cache debug",
    "test_log_level": "log_level log_level_replica log_on_each_node",
    "test_checkpoint_contents": "save_only_model save_on_each_node restore_callback_states_from_checkpoint",
    "test_greater_is_better": "greater_is_better",
    "test_average_tokens_across_devices": "average_tokens_across_devices",
    "test_accelerator_settings": """accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph""",
    "test_precision": "fp16 fp16_full_eval tf32",
    "test_compilation": "torch_compile torch_compile_backend torch_compile_mode",
    "test_optimizers_by_name": "optim_target_modules",
    "test_pinned_memory": "dataloader_pin_memory",
    "test_reporting_callbacks_read_their_fields": """run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
    "test_fields_of_processes_and_scripts": "use_cpu ddp_backend ddp_timeout local_rank do_train do_eval do_predict",
}


def test_every_field_is_honoured_or_refused():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    honoured, refused = set(honoured_fields()), set(REFUSED)
    assert not honoured & refused
    unknown = fields - honoured - refused
    assert not unknown, f"new fields of transformers {transformers.__version__}: decide about {sorted(unknown)}"
    shown = [name for names in SHOWN_BY.values() for name in names.split()]
    assert len(shown) == len(set(shown))
    assert set(shown) == honoured


@pytest.mark.parametrize("test", SHOWN_BY)
def test_the_tests_that_show_it_exist(test):
    file, _, name = test.rpartition("::")
    path = Path(__file__).with_name(file) if file else Path(__file__)
    assert path.is_file() and re.search(rf"^def {name}", path.read_text(), re.MULTILINE)


ON = {
    "enable_jit_checkpoint": True,
    "eval_use_gather_object": True,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "parallelism_config": SimpleNamespace(tp_size=2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_fields_are_named(name, tmp_path):
    trainer = make("ours", tmp_path)  # at their defaults they are harmless
    setattr(trainer.args, name, ON[name])
    with pytest.raises(ValueError, match=f"{name}=.*not supported"):
        trainer_module.Trainer(trainer.model, trainer.args)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler"),
        ({"debug": "tpu_metrics_debug"}, "tpu_metrics_debug"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy='sorted'"),
        ({"token_budget": 0}, "token_budget"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, found 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"max_grad_norm": None}, "max_grad_norm=None"),
    ],
)
def test_refused_values_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        make("ours", tmp_path, **options)


def test_a_field_that_is_newer_than_us_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Newer(TrainingArguments):
        warp_speed: int = 1

    monkeypatch.setattr("fastalign.loop.arguments.TrainingArguments", Newer)
    trainer = make("ours", tmp_path)
    trainer.args.warp_speed = 9
    with pytest.raises(ValueError, match="warp_speed=9"):
        trainer_module.Trainer(trainer.model, trainer.args)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = AlignConfig(str(tmp_path), **SETTINGS)
    args._n_gpu = 4
    with pytest.raises(ValueError, match="accelerate launch --num_processes 4"):
        trainer_module.Trainer(tiny_model(), args)


def test_defaults_are_those_of_trl(tmp_path):
    from trl.trainer.base_config import _BaseConfig

    theirs = {field.name: field.default for field in dataclasses.fields(_BaseConfig)}
    for field in dataclasses.fields(AlignConfig):
        own = ("token_budget", "kernel_backend", "fp8", "bf16_update", "stop_on_health", "health_bounds")
        assert field.name in own or field.default == theirs[field.name], field.name
    assert AlignConfig(str(tmp_path), use_cpu=True).bf16 is True
    assert AlignConfig(str(tmp_path), use_cpu=True, bf16=False).bf16 is False
    assert AlignConfig(str(tmp_path), use_cpu=True, lr_scheduler_kwargs='{"a": 1}').lr_scheduler_kwargs == {"a": 1}
    assert all("%" not in f.metadata.get("help", "").replace("%%", "") for f in dataclasses.fields(AlignConfig))


def test_plain_training_arguments_are_accepted(tmp_path):
    args = TrainingArguments(str(tmp_path / "a"), **SETTINGS)
    trainer = make("ours", tmp_path / "b")
    plain = trainer_module.Trainer(tiny_model(), args, trainer.data_collator, tiny_rows())
    trainer.train(), plain.train()
    assert history(plain) == history(trainer)


def test_seeds_decide(tmp_path):
    runs = [make("ours", tmp_path, seed=seed, max_steps=2) for seed in (1, 1, 2)]
    losses = [run.train().training_loss for run in runs]
    assert losses[0] == losses[1] != losses[2]
    try:
        make("ours", tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_folder_and_resume_field(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make("ours", tmp_path / "deep" / "run", **options)
    whole.train()
    assert (tmp_path / "deep" / "run" / "checkpoint-3").is_dir()
    for wish in (str(tmp_path / "deep" / "run" / "checkpoint-3"), "True"):
        resumed = make("ours", tmp_path / "deep" / "run", resume_from_checkpoint=wish, **options)
        resumed.train()
        assert resumed.window.first_step == (8 if wish == "True" else 3)
        for name, value in weights(whole).items():
            assert torch.equal(weights(resumed)[name], value)
    with pytest.raises(ValueError, match="resume_from_checkpoint=True"):
        make("ours", tmp_path / "empty").train(resume_from_checkpoint=True)


def test_cache_is_emptied(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer_module, "clear_device_cache", lambda: calls.append(1))
    make("ours", tmp_path, torch_empty_cache_steps=3, gradient_accumulation_steps=1).train()
    assert len(calls) == len([step for step in range(16) if step % 3 == 0])


def test_model_settings(tmp_path):
    assert make("ours", tmp_path, use_cache=True).model.config.use_cache is True
    assert make("ours", tmp_path).model.config.use_cache is False
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="DebugUnderflowOverflow"):
        make("ours", tmp_path, model=model, debug="underflow_overflow").train()


def test_models_that_cannot_recompute_are_named(tmp_path):
    trainer = make("ours", tmp_path, model=torch.nn.Linear(2, 2), gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True .+ but Linear has no"):
        trainer.train()
    assert not trainer.is_in_train


def test_log_level(tmp_path, monkeypatch):
    before = transformers.logging.get_verbosity()
    try:
        make("ours", tmp_path, log_level="critical")
        assert transformers.logging.get_verbosity() == transformers.logging.CRITICAL
        for on_each_node, level in ((True, "ERROR"), (False, "DEBUG")):
            # the first process of the second machine
            monkeypatch.setattr(AlignConfig, "local_process_index", property(lambda self: 0))
            monkeypatch.setattr(AlignConfig, "process_index", property(lambda self: 8))
            options = {"log_level": "error", "log_level_replica": "debug", "log_on_each_node": on_each_node}
            make("ours", tmp_path, **options)
            assert transformers.logging.get_verbosity() == getattr(transformers.logging, level)
    finally:
        transformers.logging.set_verbosity(before)


def test_checkpoint_contents(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 4}
    make("ours", tmp_path / "all", **options).train()
    make("ours", tmp_path / "model", save_only_model=True, **options).train()
    assert (tmp_path / "all" / "checkpoint-4" / "optimizer.pt").is_file()
    assert not (tmp_path / "model" / "checkpoint-4" / "optimizer.pt").exists()

    def stopping():
        return transformers.EarlyStoppingCallback(early_stopping_patience=50)

    options |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    first = stopping()
    make("ours", tmp_path / "state", eval_dataset=tiny_rows(4), callbacks=[first], **options).train()
    for restore in (True, False):
        fresh = stopping()
        options["restore_callback_states_from_checkpoint"] = restore
        again = make("ours", tmp_path / "state", eval_dataset=tiny_rows(4), callbacks=[fresh], **options)
        again.train(resume_from_checkpoint=True)
        assert (fresh.early_stopping_patience_counter == first.early_stopping_patience_counter) == restore
    monkeypatch.setattr(AlignConfig, "local_process_index", property(lambda self: 0))
    monkeypatch.setattr(AlignConfig, "process_index", property(lambda self: 8))
    for each in (True, False):
        make("ours", tmp_path / f"node-{each}", save_on_each_node=each)
        assert (tmp_path / f"node-{each}").is_dir() == each


def test_greater_is_better(tmp_path):
    best = []
    for greater in (True, False):
        options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
        trainer = make("ours", tmp_path, eval_dataset=tiny_rows(4, 1), greater_is_better=greater, **options)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert trainer.state.best_metric == (max if greater else min)(losses)
        best.append(trainer.state.best_global_step)
    assert best == [None, None]  # nothing is saved, so no step is remembered


def test_average_tokens_across_devices(tmp_path, monkeypatch):
    for average, expected in ((True, 16), (False, 6)):
        trainer = make("ours", tmp_path, average_tokens_across_devices=average)
        trainer.world = 2
        monkeypatch.setattr(trainer, "_sum_over_ranks", lambda tensor: tensor + 10)  # the other rank has 10
        labels = torch.tensor([[1, 2, 3, -100]])
        assert int(steps.num_items_in_step(trainer, [{"labels": labels}] * 3)) == expected
    shared = make("ours", tmp_path, average_tokens_across_devices=True)
    batch = shared.data_collator([tiny_rows()[0]])
    alone = shared.compute_loss(shared.model, batch, num_items_in_batch=4)
    shared.world = 2
    assert shared.compute_loss(shared.model, batch, num_items_in_batch=4).item() == pytest.approx(2 * alone.item())


def test_accelerator_settings(tmp_path, monkeypatch):
    options = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False}
    handler = make("ours", tmp_path, ddp_static_graph=True, **options).accelerator.ddp_handler
    values = (handler.find_unused_parameters, handler.bucket_cap_mb, handler.broadcast_buffers, handler.static_graph)
    assert values == (True, 7, False, True)
    config = {"even_batches": False, "non_blocking": True, "split_batches": True}
    config["gradient_accumulation_kwargs"] = {"num_steps": 3, "sync_each_batch": True}
    trainer = make("ours", tmp_path, accelerator_config=config, gradient_accumulation_steps=1)
    assert trainer.args.gradient_accumulation_steps == 3
    assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] is True
    assert trainer.get_train_dataloader().batch_sampler.even is False
    moved = []
    monkeypatch.setattr(trainer_module, "send_to_device", lambda *_, non_blocking: moved.append(non_blocking))
    trainer._prepare_inputs({})
    assert moved == [True]
    trainer.world = 2
    with pytest.raises(ValueError, match=r"split_batches.*multiple"):
        trainer.get_train_dataloader()


def test_precision(tmp_path):
    with pytest.raises(ValueError, match="fp16=True needs a GPU"):  # accelerate would train in fp32 and not say so
        make("ours", tmp_path, fp16=True)
    half = make("ours", tmp_path, fp16_full_eval=True, eval_dataset=tiny_rows(4, 1))
    half.evaluate()
    assert half.model.dtype == torch.float16
    with pytest.raises(ValueError, match="tf32"):  # no such GPU here
        make("ours", tmp_path, tf32=True)


def test_compilation(tmp_path):
    plain = make("ours", tmp_path, max_steps=2)
    options = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"}
    compiled = make("ours", tmp_path, max_steps=2, **options)
    plain.train(), compiled.train()
    plugin = compiled.accelerator.state.dynamo_plugin
    assert (plugin.backend.value.lower(), plugin.mode) == ("eager", "default")
    assert isinstance(compiled.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert_same_values(compiled, plain, ("loss", "grad_norm"))


def test_optimizers_by_name(tmp_path, monkeypatch):
    for name in OptimizerNames:
        made = []
        for kind in ("ours", "theirs"):
            trainer = make(kind, tmp_path, optim=name, optim_target_modules=["q_proj"], max_steps=1)
            try:
                optimizer = trainer.create_optimizer()
                made.append((type(optimizer), {k: str(v) for k, v in optimizer.defaults.items()}))
            except (ImportError, RuntimeError, ValueError, AttributeError, TypeError) as error:  # not installed
                made.append((type(error), str(error)))
        assert made[0] == made[1], name


def test_pinned_memory(tmp_path, monkeypatch):
    for wanted in (True, False):
        trainer = make("ours", tmp_path, use_cpu=False, dataloader_pin_memory=wanted)
        assert trainer.get_train_dataloader().pin_memory is False  # nothing to copy to
        with monkeypatch.context() as patch:
            patch.setattr(AlignConfig, "device", property(lambda self: torch.device("cuda")))
            assert trainer.get_train_dataloader().pin_memory is wanted


def test_reporting_callbacks_read_their_fields(tmp_path, monkeypatch):
    seen = {}

    class Board(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.update(vars(args))

    monkeypatch.setattr(reporting, "get_reporting_integration_callbacks", lambda names: [Board] * len(names))
    fields = {"run_name": "r", "project": "p", "trackio_space_id": "s", "trackio_bucket_id": "b"}
    fields |= {"trackio_static_space_id": "t"}
    make("ours", tmp_path, report_to=["board"], max_steps=1, **fields).train()
    assert fields.items() <= seen.items()


def test_fsdp_settings(tmp_path, monkeypatch):
    given = {}

    def stop(**kwargs):
        given.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(distributed, "Accelerator", stop)
    with mock.patch.dict(os.environ):
        fields = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": False}}
        args = AlignConfig(str(tmp_path), **(SETTINGS | fields))
        with pytest.raises(InterruptedError):
            distributed.make_accelerator(args)
    plugin = given["fsdp_plugin"]
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, False)


def test_fields_of_processes_and_scripts(tmp_path, monkeypatch):
    asked = []

    def state(backend=None, timeout=None, **kwargs):
        asked.append((backend, timeout and timeout.total_seconds()))
        return PartialState(**kwargs)

    monkeypatch.setattr(training_args, "PartialState", state)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    fields = {"do_train": True, "do_eval": True, "do_predict": True, "ddp_timeout": 77, "ddp_backend": "gloo"}
    args = AlignConfig(str(tmp_path), **(SETTINGS | fields | {"use_cpu": False, "local_rank": -1}))
    assert asked == [("gloo", 77.0)] and fields.items() <= vars(args).items()
    trainer = make("ours", tmp_path)
    assert trainer.args.device.type == trainer.model.device.type == "cpu"
