"""Command line and YAML to dataclasses: the same as TRL's parser where it reads, named errors where it does not."""

import dataclasses
import os
from dataclasses import dataclass, field

import pytest
from transformers import IntervalStrategy

import fastalign
from fastalign.cli.arguments import ModelConfig, get_peft_config, get_quantization_config
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


def test_given_options_are_those_that_differ_from_the_defaults(tmp_path):
    parser = AlignParser(Settings)
    own, _ = parser.read_config_option(
        ["--config", config_file(tmp_path, "size: 4\nstrategy: no\nkeep: true"), "--no_keep"]
    )
    assert parser.given(parser.parse_known_args(own)[0]) == {"size": 4, "keep": False}
    parser = AlignParser(fastalign.SFTConfig)
    assert parser.given(parser.parse_known_args([])[0]) == {}
