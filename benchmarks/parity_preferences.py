"""Every logged number of DPO, KTO, reward models, CPO, ORPO and TPO against TRL's: ten steps on real pairs, in fp32.

    python benchmarks/parity_preferences.py --data pairs.jsonl [--only dpo/sigmoid kto/kto] [--dtype float64]

`--data` is a jsonl file with the texts `prompt`, `chosen` and `rejected`. Model (random) and tokenizer (trained on the
texts) are small and the same for both libraries, so are data, order and settings. Ours runs three times: with padded
rows, with flat tokens, and with flat tokens that share their prompt.

What is compared: `loss`, `grad_norm`, `learning_rate` and every other key that TRL logs, of each of the ten steps. A
number may differ by 1e-5 of itself, plus by what fp32 leaves of it where it is a difference, or a mean over values of
either sign: by EPS_OF_SUMMANDS = 4 machine epsilons of the size of the numbers that were added up (`summands` says
which these are). The table shows the largest difference in units of what is allowed, so 1 is the limit, and the
largest plain relative difference of `loss` and `grad_norm`.

Where a number is further off, the case is run again in fp64, TRL's with the logits of its head in fp64 too (its own
head rounds to fp32). If the libraries then agree to FP64_RTOL in every number, the difference was rounding that the
loss multiplies, and the line tells how far either library's fp32 is from its fp64. Else the exit status is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import logging
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import traceback
import types
import warnings
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RTOL = 1e-5
EPS_OF_SUMMANDS = 4
EPS = 2.0**-23
FP64_RTOL = 1e-6  # the models' norms round to fp32 also in fp64
LAYOUTS = ("padded", "flat", "shared")
CLOCK = ("runtime", "per_second", "total_flos", "preparation_time", "epoch")
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 2000
STEPS, BATCH = 10, 4
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 5e-4}
SETTINGS |= {"max_length": 1024, "logging_steps": 1, "bf16": False, "use_cpu": True, "save_strategy": "no"}
SETTINGS |= {"train_sampling_strategy": "sequential", "report_to": "none", "disable_tqdm": True, "log_level": "error"}

DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {"beta": 2.0},
}
MORE_DPO: dict[str, dict[str, Any]] = {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "ld_alpha": {"ld_alpha": 0.3},
    "weighting": {"use_weighting": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 2},
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = (  # name -> (trainer, kind of rows, settings of both libraries)
    {f"dpo/{name}": ("DPO", "pairs", {"loss_type": name} | more) for name, more in DPO.items()}
    | {f"dpo/{name}": ("DPO", "pairs", settings) for name, settings in MORE_DPO.items()}
    | {
        "kto/kto": ("KTO", "judged", {}),
        "kto/positive_kl": ("KTO", "judged", {}),  # in "kto/kto" the estimate is below 0, and so 0, in every step
        "kto/apo_zero_unpaired": ("KTO", "judged", {"loss_type": "apo_zero_unpaired"}),
        "reward": ("Reward", "pairs", {}),
        "reward/centred": ("Reward", "pairs", {"center_rewards_coefficient": 0.01}),
        "cpo/sigmoid": ("CPO", "pairs", {"loss_type": "sigmoid"}),
        "cpo/hinge": ("CPO", "pairs", {"loss_type": "hinge"}),
        "cpo/ipo": ("CPO", "pairs", {"loss_type": "ipo"}),
        "cpo/simpo": ("CPO", "pairs", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
        "cpo/alphapo": ("CPO", "pairs", {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0}),
        "orpo": ("ORPO", "pairs", {}),
        "tpo/sigmoid": ("TPO", "triples", {"loss_type": "sigmoid"}),
        "tpo/hinge": ("TPO", "triples", {"loss_type": "hinge"}),
        "tpo/ipo": ("TPO", "triples", {"loss_type": "ipo"}),
        "tpo/tpo-l": ("TPO", "triples", {"loss_type": "tpo-l", "beta": 2.0}),
    }
)


# Data and model


def read_pairs(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def kinds_of_rows(pairs: list[dict]) -> dict[str, list[dict]]:
    """Pairs; single answers, good and bad ones in turn, to different prompts; pairs with a gold answer (the chosen
    one of the row, of which the data has no better)."""
    judged = []
    for even, odd in zip(pairs[::2], pairs[1::2], strict=False):
        judged.append({"prompt": even["prompt"], "completion": even["chosen"], "label": True})
        judged.append({"prompt": odd["prompt"], "completion": odd["rejected"], "label": False})
    triples = [row | {"reference": row["chosen"]} for row in pairs]
    return {"pairs": pairs, "judged": judged, "triples": triples}


def make_models(folder: pathlib.Path, pairs: list[dict]) -> None:
    """A random Llama and a random reward model of it, with a tokenizer trained on the pairs."""
    import torch
    from against_trl import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer([row[name] for row in pairs for name in row], VOCABULARY)
    torch.manual_seed(0)
    # no biases: AdamW makes whole steps of the rounding errors of a gradient that is zero, as that of keys' biases is
    config = LlamaConfig(
        vocab_size=VOCABULARY, **SHAPE, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )  # fmt: skip
    models: dict[str, Any] = {"policy": LlamaForCausalLM(config)}
    config.num_labels = 1
    models["reward"] = LlamaForSequenceClassification(config)
    config.initializer_range = 0.05  # a reference that finds the texts much less likely
    models["reference"] = LlamaForCausalLM(config)
    for name, model in models.items():
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)


# One case, in a process of its own


def run(library: str, case: str, folder: str, dtype: str, layout: str | None = None) -> list[dict]:
    """`log_history` of ten steps of `library`."""
    import datasets
    import torch
    import transformers

    name, kind, settings = CASES[case]
    config_class, trainer_class = classes(library, name, layout)
    auto = transformers.AutoModelForSequenceClassification if name == "Reward" else transformers.AutoModelForCausalLM
    source = f"{folder}/{'reward' if name == 'Reward' else 'policy'}"
    reference = f"{folder}/reference" if case == "kto/positive_kl" else source
    load = lambda source: auto.from_pretrained(source, dtype=getattr(torch, dtype))  # noqa: E731
    with open(f"{folder}/{kind}.json", encoding="utf-8") as file:
        rows = json.load(file)
    if layout is not None:
        settings = settings | {"share_prefix": layout == "shared"}
        if dtype == "float64":  # our norms are exact then, those of the model, which TRL runs, round to fp32
            settings = settings | {"kernel_backend": "none"}
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=load(source),
            args=config_class(
                output_dir=output,
                **(SETTINGS | settings),
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(source),
            **({"ref_model": load(reference)} if name in ("DPO", "KTO") else {}),
        )
        trainer.train()
    if layout is not None and trainer.policy.flat != (layout != "padded"):
        raise RuntimeError(f"{case}: the model runs {'flat' if trainer.policy.flat else 'padded'}, not {layout}.")
    history = [row for row in trainer.state.log_history if "loss" in row]
    if case == "kto/positive_kl" and not all(row["kl"] > 0 for row in history):
        raise RuntimeError(f"{case}: kl is {[row['kl'] for row in history]}, so it is not tested.")
    return history


def classes(library: str, name: str, layout: str | None) -> tuple[Any, Any]:
    """Config and trainer; TRL's report logits/* of CPO and ORPO over the completions' tokens alone, as its other
    trainers do (as they stand they count prompts and padding); ours with `layout` "padded" take no flat batches."""
    import importlib

    experimental = library == "trl" and name in ("CPO", "ORPO", "TPO")
    module = importlib.import_module(f"trl.experimental.{name.lower()}" if experimental else library)
    config_class, trainer_class = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")
    if library == "trl" and name in ("CPO", "ORPO"):

        class OfCompletions(trainer_class):
            def concatenated_forward(self, model, batch):
                found = list(super().concatenated_forward(model, batch))
                for i, answer in enumerate(("chosen", "rejected"), 2):
                    scored = batch[f"{answer}_labels"][:, 1:] != -100
                    found[i] = found[i][:, : scored.shape[1]][scored]
                return tuple(found)

        return config_class, OfCompletions
    if layout == "padded":

        class Padded(trainer_class):
            def prepare_model(self):
                from fastalign.policy import prepare_policy
                from fastalign.reward_head import prepare_reward_model

                prepare = prepare_reward_model if name == "Reward" else prepare_policy
                return prepare(self.model, allow_flat=False)

        return config_class, Padded
    return config_class, trainer_class


def run_all(case: str, folder: str, dtype: str) -> dict[str, list[dict]]:
    """The history of TRL ("trl"), and ours by layout."""
    import torch
    from trl.trainer import dpo_trainer, utils

    class Doubles(types.ModuleType):
        """torch, with fp64 among the types for which TRL's alpha divergence has a bound: instead of bf16."""

        bfloat16 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    head = utils._ChunkedLogProbFunction
    if dtype == "float64":
        utils._ChunkedLogProbFunction, dpo_trainer.torch = ExactHead, Doubles("torch")
    try:
        theirs = run("trl", case, folder, dtype)
    finally:
        utils._ChunkedLogProbFunction, dpo_trainer.torch = head, torch
    return {"trl": theirs} | {layout: run("fastalign", case, folder, dtype, layout) for layout in LAYOUTS}


class ExactHead:
    """Stands in for TRL's fused head: the same numbers from whole logits in the type of the hidden states."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, _chunk, softcap, scale, outputs):
        """(log p of labels, entropy, log sum p^2, mean logit, whether the label is the top one), each (N,) or None."""
        import torch

        assert softcap is None and scale in (None, 1.0)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logp = torch.log_softmax(logits / temperature, -1)
        found = {
            "log_probs": logp.gather(1, labels[:, None])[:, 0],
            "entropy": -(logp.exp() * logp).sum(1).detach(),
            "log_sum_sq_probs": torch.logsumexp(2 * logp, 1).detach(),
            "mean_logits": logits.mean(1).detach(),
            "is_top1": logits.argmax(1) == labels,
        }
        return tuple(value if name in outputs else None for name, value in found.items())


def run_case(case: str, folder: str, dtype: str) -> dict[str, Any]:
    """The histories of TRL ("trl") and of ours, by layout; "error" where one of them stopped."""
    import torch
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        with open(os.devnull, "w") as nothing:
            sys.stdout = nothing
            found = run_all(case, folder, dtype)
            if dtype == "float32" and any(
                v[0] > 1 for o in LAYOUTS for v in compare(case, found[o], found["trl"]).values()
            ):
                found["exact"] = run_all(case, folder, "float64")
    except Exception:
        found["error"] = traceback.format_exc()
    finally:
        sys.stdout = sys.__stdout__
    return found


# Comparison


def summands(case: str, key: str, row: dict) -> float:
    """Size of the numbers whose sum or difference `key` is; 0 where it is compared relatively alone."""
    name, settings = CASES[case][0], CASES[case][2]
    logps = sum(abs(v) for k, v in row.items() if k.startswith("logps/"))
    beta = settings.get("beta", 0.01 if name == "TPO" else 0.1)
    if key.startswith("rewards/") and key != "rewards/accuracies":
        return beta * logps  # beta (log p - log p of the reference): sums over the tokens of an answer
    if key == "kl":
        return logps  # a difference of the same sums, without beta
    if key.startswith("logits/"):
        return 1.0  # means over the vocabulary of logits of either sign
    if name == "Reward" and key in ("mean_reward", "min_reward", "max_reward", "margin"):
        return 1.0  # products of hidden states of size 1 with the head
    if key == "log_odds_chosen":
        return logps  # a difference of means over tokens
    return 0.0


def compare(case: str, ours: list[dict], theirs: list[dict]) -> dict[str, tuple[float, float, int]]:
    """key -> (largest difference in units of what is allowed, largest relative difference, its step)."""
    worst: dict[str, tuple[float, float, int]] = {}
    for step, (own, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for key, value in other.items():
            if any(part in key for part in CLOCK) or not isinstance(value, int | float):
                continue
            apart = abs(own[key] - value) if key in own else float("inf")
            if own.get(key) != own.get(key) and value != value:  # both are not a number
                apart = 0.0
            allowed = RTOL * abs(value) + EPS_OF_SUMMANDS * EPS * summands(case, key, other)
            units = apart / allowed if allowed else (0.0 if apart == 0 else float("inf"))
            relative = apart / abs(value) if value else (0.0 if apart == 0 else float("inf"))
            if key not in worst or not units <= worst[key][0]:
                worst[key] = (units, relative, step)
    return worst


def report(case: str, found: dict[str, Any]) -> bool:
    """One line per layout, one more per key beyond its limit; whether all is within, or shown to be rounding."""
    if "error" in found:
        print(f"{case:24s} {found['error']}")
        return False
    good = True
    for layout in LAYOUTS:
        worst = compare(case, found[layout], found["trl"])
        by_units = sorted(worst, key=lambda k: worst[k][0], reverse=True)
        start = f"{case:24s} {layout:7s} {worst['loss'][1]:9.1e} {worst['grad_norm'][1]:9.1e}"
        for key in by_units[:1] + [k for k in by_units[1:] if worst[k][0] > 1]:
            units, relative, step = worst[key]
            print(f"{start:52s} {units:8.3f}  {key} (step {step}, relative {relative:.1e})", end="")
            if units > 1:
                agrees, text = examine(case, found, layout, key, step)
                good &= agrees
                print(f"  {text}", end="")
            print(flush=True)
            start = ""
    return good


def examine(case: str, found: dict[str, Any], layout: str, key: str, step: int) -> tuple[bool, str]:
    """Whether fp64 shows that a difference is rounding, in words."""
    if "exact" not in found:
        return False, "TOO FAR"
    exact, theirs = found["exact"][layout], found["exact"]["trl"]
    apart = max(
        abs(own[k] - row[k]) / (abs(row[k]) + summands(case, k, row))
        for own, row in zip(exact, theirs, strict=True)
        for k in row
        if isinstance(row[k], float) and k in own and row[k] and not any(part in k for part in CLOCK)
    )
    value = theirs[step - 1][key]
    ours, trl = (abs(found[name][step - 1][key] - value) / abs(value) for name in (layout, "trl"))
    text = f"in fp64 all agree to {apart:.0e}; from it ours is {ours:.1e}, TRL's {trl:.1e}"
    return apart <= FP64_RTOL, text if apart <= FP64_RTOL else f"TOO FAR, also in fp64 ({apart:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="jsonl file with prompt, chosen and rejected")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    start, pairs = time.perf_counter(), read_pairs(options.data)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_models(folder, pairs)
        for kind, rows in kinds_of_rows(pairs[: STEPS * BATCH]).items():
            (folder / f"{kind}.json").write_text(json.dumps(rows), encoding="utf-8")
        print(f"{'case':24s} {'layout':7s} {'loss':>9s} {'grad_norm':>9s} {'of limit':>8s}  key that differs most")
        context = multiprocessing.get_context("spawn")
        good = True
        with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            one = functools.partial(run_case, folder=name, dtype=options.dtype)
            for case, found in zip(options.only, pool.map(one, options.only), strict=True):
                good &= report(case, found)
    seconds = time.perf_counter() - start
    print(f"{len(options.only)} cases in {seconds:.0f} s: {'all agree' if good else 'NOT all agree'}")
    sys.exit(not good)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    main()
