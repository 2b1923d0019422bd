"""The installed packages: what importing them loads, and that the extension is there."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, requires
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def loaded_by(statement: str, folder: Path) -> set[str]:
    """Top-level modules that a fresh interpreter, started in `folder`, has loaded after `statement`."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_kernels_load_no_training_library(tmp_path):
    loaded = loaded_by(
        "import fastalign_kernels, fastalign_kernels.head, fastalign_kernels.attention, fastalign_kernels.losses",
        tmp_path,
    )
    assert "torch" in loaded
    heavy = {"transformers", "datasets", "accelerate", "pyarrow", "peft", "trl", "pandas", "tokenizers"}
    assert loaded & heavy == set()


def test_importing_fastalign_is_instant(tmp_path):
    loaded = loaded_by("import fastalign; dir(fastalign); fastalign.__version__", tmp_path)
    assert loaded & {"torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow"} == set()


def test_public_names_exist():
    fastalign = importlib.import_module("fastalign")
    assert len(fastalign.__all__) == len(set(fastalign.__all__)) > 10
    for name in fastalign.__all__:
        assert getattr(fastalign, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'SFTTrainr'"):
        fastalign.SFTTrainr  # noqa: B018


def test_extension_is_built_from_these_sources():
    from fastalign import _native

    stub = (ROOT / "fastalign" / "_native.pyi").read_text()
    declared = {found for line in stub.splitlines() for found in re.findall(r"^(?:def|class) (\w+)", line)}
    bound = {name for name in dir(_native) if not name.startswith("_")}
    assert declared == bound
    assert _native.first_invalid(np.array([3, -1], np.int32), 5, False) == 1
    with pytest.raises(IndexError, match="outside its chunk"):
        one = np.ones(1, np.int64)
        _native.gather([np.zeros(4, np.int32)], np.zeros(1, np.int32), one, one * 4, np.empty(4, np.int32))


def test_metadata_and_constraints_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in project["dependencies"] + extras["test"] + extras["dev"]]
    for requirement in wanted:
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow the pinned {pin}"
    installed = {Requirement(text).name for text in requires("fastalign") or [] if "extra" not in text}
    assert installed == {Requirement(text).name for text in project["dependencies"]}
    assert [entry.value for entry in entry_points(group="console_scripts", name="fastalign")] == [
        "fastalign.cli.main:main"
    ]
