"""Kernels run on the card that their tensors lie on, whichever card is the current one."""

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fastalign_kernels
import pytest
import torch
from fastalign_kernels.launch import on_its_card

FILES = sorted(Path(fastalign_kernels.__file__).parent.rglob("*.py"))


def launches(function: ast.FunctionDef) -> bool:
    """Whether a function has `some_kernel[grid](...)` in it."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(isinstance(f, ast.Subscript) and ast.unparse(f.value).endswith("_kernel") for f in calls)


def test_every_launch_is_made_on_the_card_of_its_tensors():
    found = 0
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and launches(node):
                found += 1
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                assert "on_its_card" in decorators, f"{file.name}: {node.name} launches on the current card"
    assert found > 10


@pytest.mark.parametrize(("device", "entered"), [("cpu", []), ("cuda:0", []), ("cuda:1", ["cuda:1"])])
def test_another_card_becomes_the_current_one(monkeypatch, device, entered):
    seen = []

    @contextmanager
    def card(wanted):
        seen.append(str(wanted))
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", card)
    tensor = SimpleNamespace(device=torch.device(device))
    assert on_its_card(lambda x, *, by: (x, by))(tensor, by=2) == (tensor, 2) and seen == entered
