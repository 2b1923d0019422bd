"""Steps of DPO, KTO and reward models against TRL's: same model, data, order and settings, one fresh process a run.

    python benchmarks/preferences_against_trl.py --data pairs.jsonl --steps 20 --repeats 3

`--data` is a jsonl file with the columns `prompt`, `chosen` and `rejected`; without it, texts of the lengths of
grade-school problems are made up. In the modes `dpo_shared` and `reward_shared` prompts always have about 500 tokens
and answers about 100. Runs of the two libraries alternate, so that a drift of the machine meets both; medians go to
benchmarks/results/.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from against_trl import (  # noqa: E402
    PRECISIONS,
    alternate,
    make_model_folder,
    make_parser,
    save,
    summarize,
    train,
    write_rows,
)

MODES = {  # name -> (trainer, rows, settings of both libraries)
    "dpo": ("DPO", "pairs", {}),
    "dpo_shared": ("DPO", "long", {}),
    "dpo_cached": ("DPO", "pairs", {"precompute_ref_log_probs": True}),
    "kto": ("KTO", "judged", {}),
    "reward": ("Reward", "pairs", {}),
    "reward_shared": ("Reward", "long", {}),
}
LONG = 500, 100  # words of a prompt and of an answer in `*_shared`


def make_rows(n: int, words_of_prompt: float, words_of_answer: float, spread: float, seed: int = 0) -> list[dict]:
    """Pairs of answers of made-up words, with log-normal lengths around the given medians."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5))) for _ in range(8_000)]
    weights = [1 / (i + 10) for i in range(len(words))]

    def text(median: float) -> str:
        return " ".join(rng.choices(words, weights, k=max(4, int(median * rng.lognormvariate(0, spread)))))

    texts = [(text(words_of_prompt), text(words_of_answer), text(words_of_answer)) for _ in range(n)]
    return [{"prompt": p, "chosen": " " + chosen, "rejected": " " + rejected} for p, chosen, rejected in texts]


def read_rows(path: str) -> list[dict]:
    """`prompt`, `chosen` and `rejected` of a jsonl file."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def judged(rows: list[dict]) -> list[dict]:
    """The answers of pairs one by one, with labels."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        library, folder, mode, text = sys.argv[2:6]
        settings = json.loads(text)
        name, kind, _ = MODES[mode]
        num_rows = settings["max_steps"] * settings["per_device_train_batch_size"]
        print(json.dumps(train(library, name, folder, kind, settings, num_rows)))
        return
    assert __doc__ is not None
    options = make_parser(__doc__.splitlines()[0], list(MODES), steps=20, batch=4).parse_args()
    num_rows = options.steps * options.batch
    rows = {"pairs": read_rows(options.data) if options.data else make_rows(max(num_rows, 2000), 60, 90, 0.45)}
    if len(rows["pairs"]) < num_rows:
        raise SystemExit(f"{options.data} has {len(rows['pairs'])} rows, --steps times --batch is {num_rows}.")
    rows |= {"judged": judged(rows["pairs"]), "long": make_rows(num_rows, *LONG, 0.05)}
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_rows(folder, rows)
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows["pairs"] + rows["long"]]
        make_model_folder(folder / "model", texts, vocab_size=32_000)
        for mode in options.modes:
            for precision in options.precisions:
                settings = MODES[mode][2] | PRECISIONS[precision] | {"max_steps": options.steps, "max_length": 1024}
                settings |= {"per_device_train_batch_size": options.batch} | json.loads(options.settings)
                row = {"op": "preferences", "mode": mode, "shape": f"13M V=32000 batch={options.batch}"}
                runs = alternate(__file__, [str(folder), mode, json.dumps(settings)], folder, options)
                measured += summarize(runs, "rows", row | {"dtype": precision})
    save(measured, options)


if __name__ == "__main__":
    main()
