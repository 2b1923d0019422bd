"""The `fastalign` command: named errors, grouped help, quick start, documentation, launch arguments, a run."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastalign
from benchmarks import tables
from fastalign.cli import launch
from fastalign.cli.main import COMMANDS, main
from fastalign.cli.train import make_parser

trl = pytest.importorskip("trl")
ROOT = Path(__file__).parent.parent


# What is wrong is said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--learning_rat", "1"], "unknown option `learning_rat` on the command line (did you mean `learning_rate`?)"),
        (["--learning_rate", "x"], "invalid float value: 'x'"),
        (["--max_length", "0"], "`max_length` is 0; it must be at least 1"),
        (["--dataset_columns", "prompt"], "neither JSON nor key=value"),
        (["--accelerate_config", "zero4"], "`accelerate_config` is 'zero4'; give a file, or one of single_gpu"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_wrong_options_of_a_command_end_with_code_2(capsys, line, message):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "--output_dir", "unused", *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "`fastalign sft --help` lists the options." in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "`model_name_or_path` is required"),
        (["--model_name_or_path", "m"], "Give the data: `dataset_name`"),
        (["--model_name_or_path", "m", "--dataset_name", "DATA", "--dataset_columns", "prompt=q"], "no column ['q']"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "DATA", "--dataset_train_split", "t"],
            "the splits ['train']",
        ),
        (["--model_name_or_path", "m", "--dataset_name", "DATA", "--eval_strategy", "epoch"], "no split 'test'"),
        (["--model_name_or_path", "./no-model", "--dataset_name", "DATA"], "no-model"),
    ],
)
def test_wrong_model_or_data_ends_with_code_1(tmp_path, capsys, line, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    line = [str(data) if text == "DATA" else text for text in line]
    assert main(["sft", "--output_dir", str(tmp_path / "out"), "--report_to", "none", *line]) == 1
    assert message in capsys.readouterr().err


def test_unknown_command_names_the_nearest(capsys):
    assert main(["sfft"]) == 2
    assert "unknown command 'sfft'; did you mean 'sft'?" in capsys.readouterr().err


# Help


def test_help_lists_every_field_once_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    listed = re.findall(r"^  --(\w+)", text, re.M)
    kinds = (fastalign.ScriptArguments, fastalign.SFTConfig, fastalign.ModelConfig, fastalign.DatasetMixtureConfig)
    names = [f.name for kind in kinds for f in dataclasses.fields(kind) if f.init]
    assert sorted(listed) == sorted([*names, "config", "accelerate_config"])
    headings = re.findall(r"^(\w.*):$", text, re.M)
    assert headings[:3] == ["options", "model", "data"] and {"SFT", "optimizer", "evaluation"} <= set(headings)
    without = [f.name for kind in kinds for f in dataclasses.fields(kind) if f.init and not f.metadata.get("help")]
    assert without == []
    assert "[default: 2e-05]" in text and "One of adamw_torch, adamw_torch_fused" in " ".join(text.split())


def test_overview_and_version_load_no_torch():
    code = (
        "import sys, fastalign.cli.main as m; m.main(['--help']); m.main(['--version']); dir(sys.modules['fastalign'])"
    )
    code += "; assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS) and f"fastalign {fastalign.__version__}" in done.stdout


def test_environment_report_names_versions(capsys):
    import torch

    assert main(["env"]) == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert lines["native extension"].startswith("present") and "sdpa" in lines["attention"]


# Public names


def test_public_names_are_importable_and_cover_trl():
    for name in fastalign.__all__:
        assert getattr(fastalign, name) is not None
    shared = (
        {name for names in trl._import_structure.values() for name in names}
        if hasattr(trl, "_import_structure")
        else set(dir(trl))
    )
    parts = (
        "SFT",
        "chat_template",
        "dataset",
        "Dataset",
        "conversational",
        "prompt",
        "Script",
        "Parser",
        "ModelConfig",
        "_config",
    )
    wanted = {n for n in shared if any(part in n for part in parts) and not n.startswith("_") and n[0] + n[1] != "__"}
    callables = {n for n in wanted if callable(getattr(trl, n, None))}
    assert callables - set(fastalign.__all__) == set()
    with pytest.raises(AttributeError, match="SFTTrainr"):
        fastalign.SFTTrainr  # noqa: B018


# Documentation and benchmarks


def written_commands() -> list[list[str]]:
    """The `fastalign sft` lines of README.md and docs/ that can be run as they stand."""
    lines = [
        line for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] for line in page.read_text().splitlines()
    ]
    return [shlex.split(line.replace("...", ""))[2:] for line in lines if line.startswith("fastalign sft ")]


def test_written_commands_and_examples_name_options_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    commands = [*written_commands(), ["--config", "examples/sft.yaml"]]
    assert len(commands) >= 5
    for command in commands:
        parser = make_parser("sft", fastalign.SFTConfig)
        own, from_file = parser.read_config_option(command)
        namespace, rest = parser.parse_known_args(own)
        assert launch.split_launch_arguments(from_file, rest)[1:] == ([], []), command
    assert (namespace.learning_rate, namespace.packing, namespace.test_split_size) == (2e-5, True, 0.02)


def test_bench_lists_scripts_and_refuses_others(capsys):
    assert main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names == ["kernels", "layers", "attention", "data", "train", "preferences"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "kernles"])
    assert stop.value.code == 2 and "did you mean `kernels`" in capsys.readouterr().err


def test_table_of_measurements(tmp_path):
    def row(op, provider, median, unit, date, **more):
        return {"op": op, "provider": provider, "median": median, "unit": unit, "device": "CPU", "date": date} | more

    packed = {"mode": "packed", "shape": "B=8", "dtype": "float32"}
    rows = [
        row("sft", "fastalign", 100, "tokens/s", "2026-01-01", peak_bytes=9000, **packed),
        row("sft", "trl", 1000, "tokens/s", "2026-01-01", peak_bytes=4000, **packed),
        row("sft", "fastalign", 3500, "tokens/s", "2026-01-02", peak_bytes=1000, **packed),
        row("pack", "fastalign", 0.0801, "s", "2026-01-02", shape="100k"),
        row("pack", "trl", 4, "s", "2026-01-02", shape="100k"),
        row("other", "trl", 4, "s", "2026-01-02", shape="100k"),
        row(
            "accuracy", "fastalign", 70.4, "%", "2026-01-03", shape="9; p20, p80: 95 % interval", p20=66.56, p80=73.96
        ),
    ]
    (tmp_path / "cpu.json").write_text(json.dumps(rows))
    link = "[CPU](benchmarks/results/cpu.json)"
    text = tables.table(tables.read_rows(tmp_path))
    assert text.splitlines()[2:] == [
        f"| sft | packed B=8 float32 | 3,500 tokens/s | trl 1,000 (3.5x, 4.0x the memory) | {link} |",
        f"| pack | 100k | 0.0801 s | trl 4 (49.9x) | {link} |",
        f"| accuracy | 9 | 70.4 % (95 % interval 66.6 to 74) |  | {link} |",
    ]
    page = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    assert tables.with_table(page, "new") == page.replace("old", "new")
    tables.with_table((ROOT / "README.md").read_text(), text)  # has the marks


# Several processes


def test_launch_arguments_are_told_from_unknown_ones():
    own, from_file, other = launch.split_launch_arguments(
        ["--num_machines", "1", "--nonsense", "2"], ["--num_processes=2", "--mixed_precision", "bf16", "--nonsens"]
    )
    assert own == ["--num_machines", "1", "--num_processes=2", "--mixed_precision", "bf16"]
    assert (from_file, other) == (["--nonsense", "2"], ["--nonsens"])


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3", "multi_gpu", "single_gpu"])
def test_named_configurations_say_what_those_of_trl_say(tmp_path, name):
    from importlib import resources

    other = yaml.safe_load(resources.files("trl.accelerate_configs").joinpath(f"{name}.yaml").read_text())
    own = yaml.safe_load(Path(launch.config_file_of(name, str(tmp_path))).read_text())
    assert own["distributed_type"] == other["distributed_type"] and own["num_processes"] == 1  # no GPU here
    assert own.get("fsdp_config") == other.get("fsdp_config")
    for key, value in other.get("deepspeed_config", {}).items():
        if key != "gradient_accumulation_steps":  # a setting of the run, not of the launch
            assert own["deepspeed_config"][key] == value


def test_launch_runs_the_command_again_once(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    arguments = ["--size", "1", "--num_processes", "2"]
    assert launch.launch("sft", arguments, "fsdp2", ["--num_processes", "2"]) == 0
    (parsed,) = seen
    assert (parsed.module, parsed.training_script, parsed.training_script_args) == (
        True,
        "fastalign",
        ["sft", *arguments],
    )
    assert parsed.num_processes == 2 and parsed.config_file.endswith("fsdp2.yaml") and not launch.was_launched()


ANY_PORT = ["--main_process_port", "0"]


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["--num_processes=2"], ["--multi_gpu", *ANY_PORT]),
        (["--num_processes", "1"], ANY_PORT),
        (["--num_processes", "2", "--use_fsdp"], ANY_PORT),
        (["--mixed_precision", "no", "--main_process_port", "29501"], []),
        (["--num_machines", "2", "--use_fsdp"], []),
    ],
)
def test_processes_without_gpu_use_the_launcher_of_torch_and_any_port(tmp_path, arguments, added):
    """Runs that start at once must not ask for one port; several machines must agree on one."""
    assert launch.resolve_config(None, arguments, str(tmp_path)) == arguments + added


# A run


@pytest.fixture
def model_folder(tmp_path):
    """A folder with config.json and tokenizer, but no weights."""
    from tiny import tiny_model, tiny_tokenizer

    tiny_model("qwen2").config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_run_from_scratch_can_be_repeated_from_its_file_and_loads(tmp_path, model_folder, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"{i} plus {i} is", "answer": f" {2 * i}.", "source": "x"} for i in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    line = [
        "--model_name_or_path",
        str(model_folder),
        "--from_scratch",
        "--dataset_name",
        str(data),
        "--max_steps",
        "3",
    ]
    line += ["--dataset_columns", "prompt=question,completion=answer", "--logging_steps", "1", "--report_to", "none"]
    line += ["--learning_rate", "1e-2", "--save_strategy", "no", "--use_cpu", "--bf16", "false", "--output_dir", first]
    assert main(["sft", *line]) == 0
    out = capsys.readouterr().out
    assert f"Model:    {first}" in out and f"fastalign report {first}" in out
    assert main(["sft", "--config", f"{first}/run.yaml", "--output_dir", second]) == 0
    losses = []
    for folder in (first, second):
        log = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 3 and losses[0][2] < losses[0][0]
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (first, second)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    settings = yaml.safe_load(Path(first, "run.yaml").read_text())
    assert (
        settings["dataset_columns"] == {"prompt": "question", "completion": "answer"}
        and settings["from_scratch"] is True
    )
    assert main(["report", first, second, "--output", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text().count("data-lines") >= 4
