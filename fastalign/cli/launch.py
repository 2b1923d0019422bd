"""Several processes: named `accelerate` configurations, and the arguments that go to `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

from .config_file import nearest

LAUNCHED = "FASTALIGN_LAUNCHED"  # set in the processes that `launch` starts

_FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_activation_checkpointing": False,
}
_ZERO = {
    "deepspeed_multinode_launcher": "standard",
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
}

LAUNCH_CONFIGS = {  # value of --accelerate_config -> what the configuration file says beyond the common part
    "single_gpu": {"distributed_type": "NO"},
    "multi_gpu": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": _FSDP2},
    "zero1": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": _ZERO | {"zero_stage": 1, "zero3_init_flag": False},
    },
    "zero2": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": _ZERO | {"zero_stage": 2, "zero3_init_flag": False},
    },
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": _ZERO | {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    },
}


def add_launch_option(parser: argparse.ArgumentParser) -> None:
    """Show `--accelerate_config` in the help; `launch` takes its value."""
    group = next(group for group in parser._action_groups if group.title in ("options", "optional arguments"))
    group.add_argument(
        "--accelerate_config",
        metavar="NAME|FILE",
        default=argparse.SUPPRESS,
        help=f"Start through `accelerate launch` with one of {', '.join(LAUNCH_CONFIGS)}, or a file of accelerate's.",
    )


def was_launched() -> bool:
    """Whether this process was started by `launch`."""
    return LAUNCHED in os.environ


def split_launch_arguments(from_file: list[str], rest: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Sort what the parser does not know: (for `accelerate launch`, unknown in the file, unknown otherwise)."""
    if not from_file and not rest:
        return [], [], []
    from accelerate.commands.launch import launch_command_parser

    known = launch_command_parser()._option_string_actions
    launch_arguments: list[str] = []
    unknown: tuple[list[str], list[str]] = ([], [])
    for index, strings in enumerate((from_file, rest)):
        accepts = False
        for text in strings:
            if text.startswith("--"):
                accepts = text.split("=")[0] in known
            (launch_arguments if accepts else unknown[index]).append(text)
    return launch_arguments, *unknown


def config_file_of(name: str, folder: str) -> str:
    """The path of an accelerate configuration: `name` itself if it is a file, else a named one written to `folder`."""
    if Path(name).is_file():
        return name
    if name not in LAUNCH_CONFIGS:
        raise ValueError(
            f"`accelerate_config` is {name!r}; give a file, or one of {', '.join(LAUNCH_CONFIGS)}"
            f"{nearest(name, LAUNCH_CONFIGS)}."
        )
    import torch

    processes = 1 if name == "single_gpu" else max(torch.cuda.device_count(), 1)
    common = {
        "compute_environment": "LOCAL_MACHINE",
        "machine_rank": 0,
        "main_process_port": 0,  # any that is free: another run may have accelerate's own, 29500
        "main_training_function": "main",
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
        "num_machines": 1,
        "num_processes": processes,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    path = Path(folder, f"{name}.yaml")
    path.write_text(yaml.safe_dump(common | LAUNCH_CONFIGS[name]), encoding="utf-8")
    return str(path)


def resolve_config(config: str | None, launch_arguments: list[str], folder: str) -> list[str]:
    """Arguments of `accelerate launch`, with the named `config` as a `--config_file` (written to `folder`).

    Without a configuration, several processes on a machine without accelerator are started as for GPUs, which is what
    makes accelerate use torch's launcher (gloo) instead of MPI.
    """
    from accelerate.commands.launch import launch_command_parser

    resolved = [*(["--config_file", config_file_of(config, folder)] if config else []), *launch_arguments]
    read = launch_command_parser().parse_args([*resolved, "script"])
    kind = read.config_file or read.multi_gpu or read.use_fsdp or read.use_deepspeed or read.cpu or read.tpu
    if not kind and (read.num_processes or 1) > 1 and not _has_accelerator():
        resolved.append("--multi_gpu")
    if read.main_process_port is None and not read.config_file and (read.num_machines or 1) == 1:
        resolved += ["--main_process_port", "0"]
    return resolved


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def launch(name: str, arguments: list[str], config: str | None, launch_arguments: list[str]) -> int:
    """Run `fastalign NAME ARGUMENTS` again in the processes that `accelerate launch` starts; returns the exit code.

    Those processes read the same arguments and leave the ones for accelerate alone (`was_launched`).
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    added = {LAUNCHED: "1"} | ({} if _has_accelerator() else {"ACCELERATE_USE_CPU": "true"})
    before = {key: os.environ.get(key) for key in added}
    os.environ.update(added)
    try:
        with tempfile.TemporaryDirectory() as folder:
            resolved = resolve_config(config, launch_arguments, folder)
            launch_command(launch_command_parser().parse_args([*resolved, "--module", "fastalign", name, *arguments]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode or 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return 0
