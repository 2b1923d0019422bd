"""`fastalign env`: what this machine has, for a bug report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = [
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "huggingface_hub",
    "pyarrow",
    "numpy",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "vllm",
    "trl",
]
DTYPES = ("float32", "bfloat16", "float16")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16")


def environment() -> dict[str, str]:
    """Name -> value of everything worth knowing about Python, packages, processor, accelerators and back ends."""
    import torch

    import fastalign

    return {
        "fastalign": fastalign.__version__,
        "platform": platform.platform(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "torch build": _torch_build(torch),
        "processor": f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {_cpu_features()}",
        "accelerators": _accelerators(torch),
        "native extension": _native(),
        "kernels": os.environ.get("FASTALIGN_KERNELS", "auto"),
        "attention": _attention(torch),
        "OMP": ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OMP_")) or "not set",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch_build(torch) -> str:
    parts = [
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "",
        f"HIP {torch.version.hip}" if torch.version.hip else "",
    ]
    return ", ".join([*filter(None, parts)] or ["CPU only"]) + f", {torch.backends.cpu.get_cpu_capability()}"


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    values = {name.strip(): value.strip() for name, value in lines}
    flags = values.get("flags", values.get("Features", "")).split()
    features = " ".join(feature for feature in CPU_FEATURES if feature in flags)
    return f"{values.get('model name', platform.machine())} ({features or 'baseline'})"


def _accelerators(torch) -> str:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB, sm_{d.major}{d.minor})" for d in devices)
    return "MPS" if torch.backends.mps.is_available() else "none"


def _native() -> str:
    try:
        from fastalign import _native
    except ImportError as error:
        return f"missing ({error}): plain torch is used, build it with `pip install -e .`"
    return f"present ({Path(_native.__file__).name})"


def _attention(torch) -> str:
    found = ["sdpa"]
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        found.append("torch varlen")
    if importlib.util.find_spec("torch.nn.attention.flex_attention"):
        found.append("flex" if torch.cuda.is_available() else "flex (needs a GPU)")
    found += [
        name
        for name, module in (("flash-attn", "flash_attn"), ("kernels", "kernels"))
        if importlib.util.find_spec(module)
    ]
    return ", ".join(found)


def main(arguments: list[str]) -> int:
    """Print the environment, one line each."""
    parser = argparse.ArgumentParser(prog="fastalign env", description="Print versions, devices and back ends.")
    parser.add_argument("--model", help="also say how weights of this model (folder or Hub name) would reach vLLM")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="what that model is trained in (default: %(default)s)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings")
    options = parser.parse_args(arguments)
    for name, value in environment().items():
        print(f"- {name}: {value}")
    if options.model is not None:
        import torch

        from ..rollout.vllm_check import weight_way

        dtype = getattr(torch, options.dtype)
        print(f"- weights for vLLM: {weight_way(options.model, dtype, options.trust_remote_code)}")
    return 0
