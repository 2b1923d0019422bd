"""The command line: parsing as TRL's, named errors, grouped help, quick start, launch arguments."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from transformers import IntervalStrategy

import fastalign
from fastalign.cli import launch
from fastalign.cli.arguments import ModelConfig, get_peft_config, get_quantization_config
from fastalign.cli.main import COMMANDS, main
from fastalign.cli.parser import AlignParser, TrlParser

trl = pytest.importorskip("trl")


@dataclass
class Settings:
    """Fields of every kind that a config has."""

    name: str = "a"
    size: int = 3
    rate: float = 1e-3
    length: int | None = 1024
    flag: bool = False
    keep: bool = True
    maybe: bool | None = None
    strategy: IntervalStrategy | str = "no"
    resume: str | None = None
    options: dict | str | None = None
    table: dict[str, str] | None = None
    items: list[str] | None = None
    mode: str = field(default="x", metadata={"choices": ["x", "y"], "help": "One of two."})


def parse(*arguments, kind=Settings, **kwargs):
    return AlignParser(kind).parse_args_and_config(list(arguments), **kwargs)[0]


def config_file(folder, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


# Parity with TRL


@pytest.mark.parametrize("name", ["ScriptArguments", "ModelConfig"])
def test_fields_and_defaults_are_those_of_trl(name):
    own = {f.name: (f.default, f.metadata.get("choices")) for f in dataclasses.fields(getattr(fastalign, name))}
    other = {f.name: (f.default, f.metadata.get("choices")) for f in dataclasses.fields(getattr(trl, name))}
    assert {key: own[key] for key in other} == other
    assert own.keys() - other.keys() <= {"dataset_columns", "from_scratch"}


LINES = [
    [],
    ["--name", "b", "--size=7", "--rate", "2e-5", "--length", "12", "--flag", "--no_keep", "--mode", "y"],
    ["--flag", "false", "--keep", "True", "--items", "a", "b", "--strategy", "steps", "--maybe", "true"],
    ["--options", '{"a": 1}', "--no-keep", "--resume", "x"],
]
FILES = [
    "{}",
    "name: b\nsize: 7\nrate: 2e-5\nflag: true\nkeep: false\nmode: y\nitems: [a, b]\noptions: {a: 1}\nlength: null",
]


@pytest.mark.parametrize("text", FILES)
@pytest.mark.parametrize("line", LINES)
def test_command_line_and_file_are_read_as_by_trl(tmp_path, line, text):
    arguments = ["--config", config_file(tmp_path, text), *line]
    assert parse(*arguments) == trl.TrlParser(Settings).parse_args_and_config(arguments)[0]


def test_remaining_strings_are_returned_as_by_trl(tmp_path):
    arguments = ["--size", "1", "--config", config_file(tmp_path, "other: 1\nname: q"), "--num_processes", "2"]
    for options in (
        {"return_remaining_strings": True},
        {"return_remaining_strings": True, "separate_remaining_strings": True},
    ):
        own = TrlParser(Settings).parse_args_and_config(arguments, **options)
        assert own == trl.TrlParser(Settings).parse_args_and_config(arguments, **options)
    assert own == (Settings(size=1, name="q"), ["--other", "1"], ["--num_processes", "2"])


def test_adapter_and_quantisation_configs_are_those_of_trl(monkeypatch):
    arguments = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "use_dora": True}
    own, other = (
        get(cls(**arguments)) for get, cls in ((get_peft_config, ModelConfig), (trl.get_peft_config, trl.ModelConfig))
    )
    assert own.to_dict() == other.to_dict() and own.target_modules == "all-linear"
    assert get_peft_config(ModelConfig()) is None and get_quantization_config(ModelConfig()) is None
    monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    for bits in ({"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"}, {"load_in_8bit": True}):
        assert (
            get_quantization_config(ModelConfig(**bits)).to_dict()
            == trl.get_quantization_config(trl.ModelConfig(**bits)).to_dict()
        )
    with pytest.raises(ValueError, match="choose one"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)


# What we read more generously


def test_none_bare_flags_mappings_and_yaml_words(tmp_path):
    assert parse("--length", "none").length is None
    assert parse("--maybe").maybe is True
    assert parse("--table", "prompt=question,completion=answer").table == {
        "prompt": "question",
        "completion": "answer",
    }
    assert parse("--table", '{"a": "b"}').table == {"a": "b"}
    read = parse("--config", config_file(tmp_path, "strategy: no\nresume: true\nsize: '4'\nname: 12\nitems: one"))
    assert (read.strategy, read.resume, read.size, read.name, read.items) == ("no", "true", 4, "12", ["one"])


def test_environment_block_is_set_and_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTALIGN_TEST_VARIABLE", raising=False)
    path = config_file(tmp_path, "env: {FASTALIGN_TEST_VARIABLE: 5}\nsize: 4\nname: file")
    assert parse("--config", path, "--size", "9") == Settings(size=9, name="file")
    assert os.environ.pop("FASTALIGN_TEST_VARIABLE") == "5"


# What is wrong is said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 3", r"`lenght` in the config file \(did you mean `length`\?\)"),
        ("size: x", "`size` in the config file: invalid int value: 'x'"),
        ("size: [1]", r"`size` in the config file is \[1\]; it must be INT"),
        ("size: 1.5", "it must be INT"),
        ("flag: 3", "`flag` in the config file is 3; it must be BOOL"),
        ("mode: z", r"`mode` in the config file: invalid choice: 'z'"),
        ("- 1", "must contain a YAML mapping"),
        ("env: 3", "`env` in .* must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_errors_in_the_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse("--config", config_file(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--siez", "3"], r"`siez` on the command line \(did you mean `size`\?\)"),
        (["--config", "absent.yaml"], "'absent.yaml' does not exist"),
        (["--config", "a", "--config=b"], "given 2 times"),
        (["--config"], "needs the path"),
    ],
)
def test_errors_on_the_command_line(line, message):
    with pytest.raises(ValueError, match=message):
        parse(*line)


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
