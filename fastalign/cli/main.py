"""The `fastalign` command: finds the subcommand and imports nothing else, so that it starts at once."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from functools import partial

from .config_file import set_environment_early


def _train(name: str, arguments: list[str]) -> int:
    """`fastalign NAME` for the name of a trainer; its classes are public names of fastalign, imported here."""
    set_environment_early(arguments)
    import fastalign

    from .train import run

    stem = TRAINERS[name][1]
    return run(name, getattr(fastalign, f"{stem}Config"), getattr(fastalign, f"{stem}Trainer"), arguments)


def _demo(arguments: list[str]) -> int:
    from fastalign.demo import main

    return main(arguments)


def _report(arguments: list[str]) -> int:
    from .report import main

    return main(arguments)


def _bench(arguments: list[str]) -> int:
    from .bench import main

    return main(arguments)


def _env(arguments: list[str]) -> int:
    from .env import main

    return main(arguments)


TRAINERS = {  # name -> (what it does, X where fastalign.XConfig and fastalign.XTrainer are its classes)
    "sft": ("supervised fine-tuning of a language model", "SFT"),
    "cpo": ("preferences without a reference: CPO, SimPO, AlphaPO", "CPO"),
    "orpo": ("fine-tuning and preferences in one, without a reference", "ORPO"),
    "tpo": ("preferences and a gold answer, without a reference", "TPO"),
    "dpo": ("preference optimisation on pairs of answers (DPO and its relatives)", "DPO"),
    "kto": ("KTO and APO-zero on answers judged good or bad", "KTO"),
    "bco": ("BCO on answers judged good or bad", "BCO"),
    "grpo": ("completions of a prompt judged against each other (GRPO and its relatives)", "GRPO"),
    "rloo": ("completions of a prompt judged against the mean of the others (RLOO)", "RLOO"),
    "ppo": ("a policy and its critic, from a reward model or functions (PPO)", "PPO"),
    "online-dpo": ("the policy's own completions, compared in pairs (Online DPO)", "OnlineDPO"),
    "nash-md": ("completions against those of a mixture with the reference (Nash-MD)", "NashMD"),
    "xpo": ("completions against the reference's, with a bonus for exploring (XPO)", "XPO"),
    "reward": ("reward model from pairs of answers", "Reward"),
    "prm": ("process reward model from judged steps", "PRM"),
}
COMMANDS = {  # name -> (what it does, the function that takes the remaining arguments)
    **{name: (text, partial(_train, name)) for name, (text, _) in TRAINERS.items()},
    "report": ("one HTML file with the curves and samples of a run", _report),
    "demo": ("train and evaluate a small model here, in about a minute", _demo),
    "bench": ("run the benchmarks of a source checkout", _bench),
    "env": ("versions, devices and back ends, to paste into a bug report", _env),
}


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastalign COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "`fastalign COMMAND --help` explains one command; `fastalign --version` prints the version.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code (0 done, 1 failed, 2 wrong usage)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, *rest = arguments
    if name in ("--version", "-V"):
        import fastalign

        print(f"fastalign {fastalign.__version__}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"fastalign: error: unknown command {name!r}{hint}\n\n{_overview()}", file=sys.stderr)
        return 2
    # threads that wait must sleep: beside another busy process, spinning ones slow everything several times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return COMMANDS[name][1](rest)
    except KeyboardInterrupt:
        print("fastalign: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
