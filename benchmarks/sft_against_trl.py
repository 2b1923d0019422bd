"""SFT steps per second and peak memory against TRL: same model, data, order and settings, one fresh process a run.

    python benchmarks/sft_against_trl.py --data train.jsonl --steps 30 --repeats 3

`--data` is a jsonl file with two text columns (`--columns question answer`); without it, texts of similar lengths are
made up. Runs of the two libraries alternate, so that a drift of the machine meets both; medians go to
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

MODES = {  # name -> settings of both libraries
    "unpacked": {"packing": False},
    "packed": {"packing": True},
}


def make_texts(n: int, seed: int = 0) -> list[dict]:
    """Questions and answers of made-up words, with the lengths of grade-school problems (log-normal)."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000)]
    weights = [1 / (i + 10) for i in range(len(words))]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, weights, k=max(4, int(rng.lognormvariate(mean, 0.45)))))

    return [{"prompt": text(3.7), "completion": " " + text(3.9)} for _ in range(n)]


def read_texts(path: str, columns: list[str]) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{"prompt": row[columns[0]], "completion": "\n" + row[columns[1]]} for row in rows]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        library, folder, settings = sys.argv[2:5]
        print(json.dumps(train(library, "SFT", folder, "rows", json.loads(settings))))
        return
    assert __doc__ is not None
    parser = make_parser(__doc__.splitlines()[0], list(MODES), steps=30, batch=8)
    parser.add_argument("--columns", nargs=2, default=["question", "answer"], help="its prompt and completion columns")
    options = parser.parse_args()
    rows = read_texts(options.data, options.columns) if options.data else make_texts(4000)
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_rows(folder, {"rows": rows})
        make_model_folder(folder / "model", rows, vocab_size=32_000)
        for mode in options.modes:
            for precision in options.precisions:
                settings = MODES[mode] | PRECISIONS[precision] | {"max_steps": options.steps, "max_length": 1024}
                settings |= {"per_device_train_batch_size": options.batch} | json.loads(options.settings)
                row = {"op": "sft", "mode": mode, "shape": f"13M V=32000 batch={options.batch}", "dtype": precision}
                runs = alternate(__file__, [str(folder), json.dumps(settings)], folder, options)
                measured += summarize(runs, "tokens", row)
    save(measured, options)


if __name__ == "__main__":
    main()
