"""The benchmarks: a provider that is wrong is not timed, rows say what was measured, and every suite runs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import measure  # noqa: E402
import results_file  # noqa: E402
from measure import Case, Provider, Roof  # noqa: E402


def square_case(providers: list[Provider]) -> Case:
    """The sum of squares of a vector, whose gradient is twice the vector."""

    def exact(inputs):
        total = inputs["x"].square().sum()
        total.backward()
        return {"total": total}

    return Case(
        op="square", shape="N=1000", dtype=torch.float32, make=lambda: {"x": torch.randn(1000, requires_grad=True)},
        exact=exact, providers=[Provider("exact", exact), *providers], flops=0, bytes=8000,
    )  # fmt: skip


def test_wrong_results_and_gradients_are_not_timed(capsys):
    def wrong_value(inputs):
        total = inputs["x"].square().sum() * 1.01
        total.backward()
        return {"total": total}

    def wrong_gradient(inputs):
        total = inputs["x"].square().sum()
        inputs["x"].grad = 2.1 * inputs["x"].detach()
        return {"total": total}

    def without_gradient(inputs):
        return {"total": inputs["x"].detach().square().sum()}

    names = {"value": wrong_value, "gradient": wrong_gradient, "none": without_gradient}
    providers = [Provider(name, run) for name, run in names.items()]
    providers += [Provider("absent", wrong_value, "no-such-package"), Provider("card", wrong_value, needs_cuda=True)]
    case = square_case(providers)
    rows = measure.measure(case, [p.name for p in case.providers], 3, Roof())
    assert [row["provider"] for row in rows] == ["exact"]
    assert rows[0]["error"] < 1e-6 and rows[0]["p20"] <= rows[0]["median"] <= rows[0]["p80"]
    out = capsys.readouterr().out
    for text in (
        "value: left out, its error 1.0e-02", "gradient: left out, its error 5.0e-02",
        "none: left out, ValueError: ['grad_x'] were not computed",
        "absent: left out, no-such-package is not installed",
    ):  # fmt: skip
        assert text in out, text
    assert torch.cuda.is_available() or "card: left out, it needs a GPU" in out


def test_what_is_measured_stays_when_a_later_case_fails(tmp_path, capsys):
    """Each case is on disk before the next one starts; what a card has no room for in fp64 is held against fp32."""
    path, fine, large, broken = tmp_path / "found.json", square_case([]), square_case([]), square_case([])
    narrow, exact = square_case([]), fine.exact

    def exhausted(inputs):
        raise torch.OutOfMemoryError("no room for fp32")

    def in_fp32(inputs):
        if inputs["x"].dtype == torch.float64:
            raise torch.OutOfMemoryError("no room for fp64")
        return exact(inputs)

    def fails(inputs):
        raise RuntimeError(f"{len(results_file.read_rows(path))} rows")

    large.exact, broken.exact, narrow.exact = exhausted, fails, in_fp32
    own = measure.Provider("fastalign", exact)
    for case in (fine, large, broken, narrow):
        case.providers = [own]
    options = measure.parser_of("", ["fastalign"], "").parse_args(["--repeats", "1", "--output", str(path)])
    assert measure.run_cases([fine, large, narrow], options) == 0 and len(results_file.read_rows(path)) == 2
    assert measure.run_cases([broken, fine], options) == 1 and len(results_file.read_rows(path)) == 3
    out = capsys.readouterr().out
    assert "left out, no room for fp32" in out and "failed, RuntimeError: 2 rows" in out


def test_peak_memory_is_what_a_call_adds():
    if measure.peak_bytes(lambda: None) is None:
        pytest.skip("the peak of this process cannot be reset here")
    base = torch.ones(2**24)
    peak = measure.peak_bytes(lambda: (base + 1).sum())  # 64 MiB of sums, freed at once
    assert 60 * 2**20 < peak < 80 * 2**20


def test_rows_are_appended_with_what_ran(tmp_path):
    path = tmp_path / "results" / "device.json"
    row = {"op": "a", "provider": "fastalign", "median": 1.23456789, "unit": "ms"}
    results_file.append_rows(path, [row])
    results_file.append_rows(path, [row | {"median": 2}])
    first, second = json.loads(path.read_text())
    assert (first["median"], second["median"]) == (1.23457, 2) and first["torch"] == torch.__version__
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="Unknown fields"):
        results_file.append_rows(path, [row | {"speed": 1}])
    with pytest.raises(ValueError, match="lacks"):
        results_file.append_rows(path, [{"op": "a"}])


@pytest.mark.parametrize("name", ["kernels", "attention", "layers"])
def test_suites_run_at_tiny_shapes(name):
    peers = {"kernels": "naive,trl", "attention": "padded,dense-mask", "layers": "torch"}[name]
    command = [
        sys.executable,
        "-m",
        "fastalign",
        "bench",
        name,
        "--dry-run",
        "--dtypes",
        "float32",
        "--against",
        peers,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for provider in ["fastalign", *peers.split(",")]:
        assert f"  {provider} " in done.stdout and f"{provider}: left out" not in done.stdout
    if name == "layers":
        refused = subprocess.run([*command[:-1], "nobody"], capture_output=True, text=True, cwd=ROOT)
        assert refused.returncode == 1 and "unknown ['nobody']" in refused.stderr


def test_parts_of_the_gpu_suite_run_in_the_interpreter():
    command = [sys.executable, "benchmarks/gpu_suite.py", "--dry-run", "--parts", "numerics", "forms"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    bounds = {"rows, logits of scale 1": 2e-2, "offset, logits of scale 40": 1e-3}  # rows: 16-bit logits without a GPU
    for name, bound in bounds.items():
        found = json.loads(done.stdout.partition(f'"{name}": ')[2].partition("}")[0] + "}")
        assert found["logp_max"] < bound and found["grad_hidden"] < 1e-2 and found["grad_weight"] < 1e-2, found


def test_a_part_that_hangs_or_crashes_costs_no_other(tmp_path, monkeypatch):
    """It is killed at its limit with what it started, and its lines stay; errors are results."""
    import gpu_suite

    child = "import time; print('child', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    found = gpu_suite.run([sys.executable, "-c", code], 3)
    assert found["exit_code"] == "stopped after 3 s" and found["lines"] == ["child"]
    assert time.perf_counter() - start < 20
    monkeypatch.setitem(gpu_suite.PARTS, "tiles", (9, lambda call: 1 / 0))  # pyright: ignore[reportArgumentType]
    assert gpu_suite.measure("tiles", gpu_suite.Call(True, 9, tmp_path)) == {
        "exit_code": "ZeroDivisionError: division by zero"
    }


def test_goals_stand_beside_what_was_reached():
    from suite_parts import goals

    row = {"op": "linear_logprobs", "provider": "fastalign", "mode": "no gradient", "shape": "N=8 H=4096 V=99"}
    row |= {"median": 2.0, "unit": "ms", "share_of_roof": 0.9}
    others = [row | {"provider": "trl"}, row | {"shape": "N=8 H=100 V=99"}, row | {"op": "packed_attention"}]
    found = goals([row, *others, row | {"share_of_roof": 0.8, "median": 3.0}])
    assert found == {"linear_logprobs no gradient N=8 H=4096 V=99": {"goal": 0.86, "reached": 0.8, "ms": 3.0}}


def test_the_suite_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Parts that are done are skipped, those that failed or had no time come again."""
    import gpu_suite

    ran, broken = [], {"exit_code": "stopped after 9 s"}

    def part(name, found):
        def measured(call):
            ran.append(name)
            results_file.append_rows(call.rows, [{"op": name, "provider": "fastalign", "median": 1.0, "unit": "ms"}])
            return found.get(name, {"fine": True})

        return 60, measured

    def call(found, *more):
        monkeypatch.setattr(gpu_suite, "PARTS", {name: part(name, found) for name in ("a", "b", "c")})
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--output", str(tmp_path), *more])
        ran.clear()
        return gpu_suite.main(), list(ran)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results_file, "device_name", lambda: "Some Card")
    assert call({}, "--minutes", "0.1") == (1, [])
    assert call({"b": broken}) == (1, ["a", "b", "c"])
    assert call({}) == (0, ["b"]) and call({}) == (0, []) and call({}, "--again", "--parts", "c") == (0, ["c"])
    assert [row["op"] for row in results_file.read_rows(tmp_path / "some_card.json")] == ["a", "b", "c", "b", "c"]
    assert {"machine", "goals"} < json.loads((tmp_path / "suite" / "some_card.json").read_text()).keys()
