"""Two ranks on the CPU (gloo), started as users start them: DDP and FSDP2 do what one process does."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from loop_runs import history, trainer
from rank_runs import CASES, train
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from fastalign.loop.distributed import await_gloo_threads, make_accelerator
from fastalign.loop.offload import offload_activations

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
KINDS = {
    "ddp": (["--multi_gpu"], "MULTI_CPU DistributedDataParallel 2"),
    "fsdp2": (["--use_fsdp", "--fsdp_version", "2"], "FSDP FSDPLlamaForCausalLM 2"),
}


def launch(kind: str, folder: Path, runs: list[dict]) -> None:
    tests = Path(__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    env.pop("ACCELERATE_USE_CPU", None)
    command = [*LAUNCH, *KINDS[kind][0], str(tests / "rank_runs.py"), str(folder), json.dumps(runs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The runs of one process, with the same global batch: twice the accumulation."""
    folder = tmp_path_factory.mktemp("single")
    for name in CASES:
        train(folder / name, name, accumulation=4)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def ranks(request, single, tmp_path_factory):
    """The same by two ranks, plus runs that go on from the checkpoint of one process."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = [{"folder": name, "name": name, "accumulation": 2} for name in CASES]
    runs += [
        {"folder": f"{n}_on", "name": n, "accumulation": 2, "resume": str(single / n / "checkpoint-2")} for n in CASES
    ]
    runs += [{"folder": "dropout", "name": "dropout", "accumulation": 2}]
    runs += [runs[-1] | {"folder": "dropout_on", "resume": str(folder / "dropout" / "checkpoint-2")}]
    runs += [{"folder": "bf16", "name": "bf16", "accumulation": 2}]
    launch(request.param, folder, runs)
    return request.param, folder


def assert_same_log(found: list[dict], expected: list[dict]) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"mean_logp", "train_loss"}:  # a mean over micro-batches: these differ in their rows
            assert mine[key] == pytest.approx(other[key], rel=1e-5), key


def read(folder: Path) -> dict:
    return json.loads((folder / "log.json").read_text())


def final(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "final" / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / "final" / name)


@pytest.mark.parametrize("name", list(CASES))
def test_ranks_equal_one_process(name, ranks, single):
    kind, folder = ranks
    found, expected = read(folder / name), read(single / name)
    assert found["kind"] == KINDS[kind][1].replace("Llama", {"tied": "Qwen2"}.get(name, "Llama")) or name == "adapter"
    assert_same_log(found["history"], expected["history"])
    mine, other = final(folder / name), final(single / name)
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-5)
    if name == "llama":
        loaded = AutoModelForCausalLM.from_pretrained(folder / name / "final")
        assert type(loaded).__name__ == "LlamaForCausalLM"
        assert torch.equal(loaded.lm_head.weight, mine["lm_head.weight"])


@pytest.mark.parametrize("name", list(CASES))
def test_checkpoints_pass_between_one_process_and_ranks(name, ranks, single, tmp_path):
    _, folder = ranks
    expected = read(single / name)["history"]
    assert_same_log(read(folder / f"{name}_on")["history"][:4], expected[:4])
    one = trainer(tmp_path, **CASES[name], gradient_accumulation_steps=4)
    one.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    assert_same_log(history(one.state)[:4], expected[:4])
    files = {path.name for path in (folder / name / "checkpoint-2").iterdir()}
    lone = {path.name for path in (single / name / "checkpoint-2").iterdir()}
    assert files - lone == {"rng_state_0.pth", "rng_state_1.pth"} and lone - files == {"rng_state.pth"}


def test_resumed_ranks_equal_uninterrupted_ranks(ranks):
    _, folder = ranks
    mine, other = final(folder / "dropout_on"), final(folder / "dropout")
    assert all(torch.equal(mine[key], other[key]) for key in other)
    assert read(folder / "dropout_on")["history"][:4] == read(folder / "dropout")["history"][:4]


def test_loss_leaves_a_bf16_model_in_full_precision(ranks, single):
    _, folder = ranks
    for mine, other in zip(read(folder / "bf16")["history"], read(single / "llama")["history"][:4], strict=False):
        loss = torch.tensor(mine["loss"])
        assert loss.item() == pytest.approx(other["loss"], abs=0.02) and loss != loss.bfloat16()


def test_full_disk_stops_all_ranks(ranks):
    _, folder = ranks
    for rank in range(2):
        text = (folder / "full" / f"error_{rank}.txt").read_text()
        assert text.startswith(f"{errno.ENOSPC} ") and "checkpoint-2: the disk is full" in text
    assert [path.name for path in (folder / "full").glob("*checkpoint-*")] == ["checkpoint-1"]


def test_activation_offloading_changes_nothing_on_the_cpu():
    model = tiny_model("llama")
    ids = torch.randint(5, 331, (2, 9))
    grads = []
    for context in (torch.enable_grad(), offload_activations(model)):
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_accelerator_settings(tmp_path):
    args = trainer(tmp_path, ddp_bucket_cap_mb=7, ddp_broadcast_buffers=False, gradient_accumulation_steps=3).args
    made = make_accelerator(args)
    assert made.gradient_accumulation_steps == 1
    assert (made.ddp_handler.bucket_cap_mb, made.ddp_handler.broadcast_buffers) == (7, False)
    assert made.ddp_handler.find_unused_parameters is True  # no checkpointing: transformers' default
    args.accelerator_config.gradient_accumulation_kwargs = {"num_steps": 2}
    with pytest.raises(ValueError, match="num_steps=2 and gradient_accumulation_steps is 3"):
        make_accelerator(args)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are seen on Linux only")
def test_exit_waits_for_gloo_threads_until_they_rest():
    started, stop = threading.Event(), threading.Event()

    def work():  # as a thread that waits for the interpreter's lock, then as one that has nothing to do
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        started.set()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            time.sleep(0.005)
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    before = time.monotonic()
    await_gloo_threads(limit=0.1)
    limited = time.monotonic()
    await_gloo_threads(limit=60)
    rested = time.monotonic()
    stop.set()
    thread.join()
    assert 0.1 <= limited - before < 0.4 and 0.45 <= rested - before < 30
    await_gloo_threads(limit=60)
    assert time.monotonic() - rested < 20
