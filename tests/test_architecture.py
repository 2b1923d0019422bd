"""The written rules of the code that a machine can hold: layers, sizes, names and links."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted([*(ROOT / "fastalign").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
NATIVE = sorted((ROOT / "csrc").glob("*.[ch]pp"))
PYTHON = [*LIBRARY, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, LINES_OF_A_KERNEL = 400, 60, 120
LINES_OF_THE_LIBRARY = 39_500  # docstrings, comments and blank lines included

# From the bottom up; a module imports from its own layer or from one below, and a trainer never another trainer.
LAYERS = [
    ["fastalign._native"],
    ["fastalign_kernels"],
    ["fastalign.data"],
    ["fastalign.findings", "fastalign.rewards"],
    ["fastalign.config", "fastalign.config_groups", "fastalign.metrics", "fastalign.models", "fastalign.adapters"],
    [
        "fastalign.logit_form",
        "fastalign.scoring_head",
        "fastalign.flat_attention",
        "fastalign.free_tokens",
        "fastalign.patch",
        "fastalign.precision",
    ],
    ["fastalign.policy_check", "fastalign.policy", "fastalign.reward_head"],
    ["fastalign.loop"],
    [
        "fastalign.given_data",
        "fastalign.rollout",
        "fastalign.pairs",
        "fastalign.reference",
        "fastalign.reference_models",
        "fastalign.reference_free",
        "fastalign.sampled_pairs",
        "fastalign.unpaired",
        "fastalign.bema",
        "fastalign.value_model",
    ],
    ["fastalign.sampled_data"],
    ["fastalign.trainers"],
    ["fastalign.report"],
    ["fastalign.cli", "fastalign.demo", "fastalign.__main__"],
]
KERNEL_IMPORTS = {"torch", "triton", "fastalign_kernels", *sys.stdlib_module_names}
KERNEL_OPTIONS = {"flash_attn"}  # imported inside the functions that need them, where they are installed
NATIVE_USERS = ("fastalign.data.", "fastalign_kernels.", "fastalign.cli.env")  # env reports whether it is there
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "misc", "base", "manager"}


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute names of everything that a file imports anywhere, with the line."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def layer_of(name: str) -> int | None:
    for level, members in enumerate(LAYERS):
        if any(name == member or name.startswith(member + ".") for member in members):
            return level
    return None


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("path", LIBRARY, ids=where)
def test_imports_point_down(path):
    name = module_name(path)
    level = layer_of(name)
    assert level is not None or name == "fastalign", f"{where(path)} belongs to no layer; give it one in LAYERS"
    for imported, line in imports(path):
        top = imported.split(".")[0]
        assert top not in ("tests", "benchmarks", "tiny", "conftest"), f"{where(path, line)} imports {imported}"
        if top not in ("fastalign", "fastalign_kernels"):
            continue
        below = layer_of(imported)
        if below is None:  # a public name of fastalign itself, for which it may load anything up to the trainers
            below = 0 if imported == "fastalign.__version__" else layer_of("fastalign.trainers")
        if level is not None and below is not None:
            assert below <= level, f"{where(path, line)}: {name} imports upward, {imported}"
        if name.startswith("fastalign.trainers.") and imported.startswith("fastalign.trainers."):
            assert imported.split(".")[2] == name.split(".")[2], f"{where(path, line)}: a trainer imports another"
        if imported.startswith("fastalign._native"):
            assert name.startswith(NATIVE_USERS), f"{where(path, line)}: {name} must not use the extension directly"


@pytest.mark.parametrize("path", [path for path in LIBRARY if "kernels" in path.parts], ids=where)
def test_kernels_import_torch_and_triton_only(path):
    at_load = {node.lineno for node in ast.parse(path.read_text()).body}
    for imported, line in imports(path):
        allowed = KERNEL_IMPORTS if line in at_load else KERNEL_IMPORTS | KERNEL_OPTIONS
        known = imported.split(".")[0] in allowed or imported.startswith("fastalign._native")
        assert known, f"{where(path, line)} imports {imported}"


def test_modules_do_not_import_in_circles():
    """What modules import when they are loaded has no cycle, so that any of them can be imported first."""
    modules = {module_name(path): path for path in LIBRARY}
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        at_load = {node.lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
        targets = {imported for imported, line in imports(path) if line in at_load}
        graph[name] = {t if t in modules else t.rpartition(".")[0] for t in targets} & modules.keys() - {name}
    done: set[str] = set()
    while ready := {name for name, needed in graph.items() if name not in done and needed <= done}:
        done |= ready
    assert done == graph.keys(), f"import cycle among {sorted(graph.keys() - done)}"


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=where)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < LINES_OF_A_FILE, f"{where(path)} has {len(text.splitlines())} lines"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = LINES_OF_A_KERNEL if is_kernel else LINES_OF_A_FUNCTION
            length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            assert length < limit, f"{where(path, node.lineno)}: {node.name} has {length} lines"


def test_the_library_is_small():
    lines = sum(len(path.read_text().splitlines()) for path in [*LIBRARY, *NATIVE])
    print(f"{lines} lines in fastalign, fastalign_kernels and csrc")
    assert lines < LINES_OF_THE_LIBRARY


@pytest.mark.parametrize("path", PYTHON, ids=where)
def test_names_say_what_it_is(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    words = {word for part in parts for word in part.split("_")}
    assert not words & FORBIDDEN_NAMES
    if path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                words = {word.lower() for word in re.findall("[A-Z][a-z]*", node.name)}
                forbidden = words & {"utils", "helper", "helpers", "misc", "manager"}
                assert not forbidden, f"{where(path, node.lineno)}: {node.name}"


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.read_text().strip()], ids=where)
def test_modules_open_with_a_sentence(path):
    sentence = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(sentence.splitlines()[0:1]) == 1 and len(sentence) > 20, f"{where(path)} needs a docstring"


def test_no_package_shadows_kernels_of_hugging_face():
    shadowing = [path for path in ROOT.rglob("__init__.py") if ".venv" not in str(path.relative_to(ROOT))]
    shadowing = [path for path in shadowing if path.parent.name == "kernels" or path.is_relative_to(ROOT / "tests")]
    assert shadowing == []


def documents() -> list[Path]:
    folders = [ROOT / name for name in ("docs", "benchmarks", "examples")]
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])


@pytest.mark.parametrize("path", documents(), ids=where)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (path.parent / target.split("#")[0]).exists(), f"{where(path)} links to {target}"


def test_git_ignores_no_source():
    """A file that git ignores is missing from a fresh clone."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    sources = [str(path.relative_to(ROOT)) for path in [*PYTHON, *NATIVE]]
    assert sorted(set(sources) - set(listed.stdout.splitlines())) == []
