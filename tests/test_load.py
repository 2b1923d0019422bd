"""Loading of files, folders and mixtures: what comes out, against the rows that were written and against TRL."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from fastalign.data.load import load_rows
from fastalign.data.mixture import DatasetConfig, DatasetMixtureConfig, get_dataset

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "n": i} for i in range(10)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder, kind):
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "tsv":
        table.to_csv(path, index=False, sep="\t")
    elif kind == "txt":
        path.write_text("".join(row["question"] + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "tsv", "txt"])
def test_files_of_every_kind(tmp_path, kind):
    path = write(tmp_path, kind)
    expected = [{"text": row["question"]} for row in ROWS] if kind == "txt" else ROWS
    assert list(load_rows(path, split="train")) == expected
    assert list(load_rows(path)["train"]) == expected
    assert list(load_rows(path, split="train", streaming=True)) == expected


def test_patterns_and_folders(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"split": split}) + "\n")
    assert list(load_rows(str(tmp_path / "t*.jsonl"), split="train")) == [{"split": "test"}, {"split": "train"}]
    splits = load_rows(str(tmp_path))
    assert {name: list(rows) for name, rows in splits.items()} == {
        "train": [{"split": "train"}],
        "test": [{"split": "test"}],
    }
    assert list(load_rows("json", data_files=str(tmp_path / "test.jsonl"), split="train")) == [{"split": "test"}]


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "many")
    assert list(load_rows(str(tmp_path / "one"))["train"]) == ROWS
    assert list(load_rows(str(tmp_path / "many"), split="test")) == [ROWS[3]]
    assert list(load_rows(str(tmp_path / "many"), split="test", streaming=True)) == [ROWS[3]]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        load_rows(str(tmp_path / "many"), split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_kept_and_renamed(tmp_path, streaming):
    path = write(tmp_path, "jsonl")
    kept = load_rows(path, split="train", columns=["answer"], streaming=streaming)
    assert list(kept) == [{"answer": row["answer"]} for row in ROWS]
    renamed = load_rows(path, columns={"prompt": "question", "completion": "answer"}, streaming=streaming)["train"]
    assert list(renamed) == [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
    with pytest.raises(ValueError, match=r"no column \['reply'\]; it has \['question', 'answer', 'n'\]"):
        load_rows(path, split="train", columns={"completion": "reply"}, streaming=streaming)
    with pytest.raises(ValueError, match="twice"):
        load_rows(path, split="train", columns={"a": "n", "b": "n"}, streaming=streaming)


def test_wrong_paths_are_named(tmp_path):
    write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match=r"no file or folder .*rows\.json'.*Did you mean .*rows\.jsonl"):
        load_rows(str(tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="No file fits"):
        load_rows(str(tmp_path / "*.csv"))
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"\['.xlsx'\]; allowed"):
        load_rows(str(tmp_path / "rows.xlsx"))
    with pytest.raises(ValueError, match="'dev'"):
        load_rows(write(tmp_path, "csv"), split="dev")


def entry(tmp_path, name, rows, **fields):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"from": name, "i": i}) + "\n" for i in range(rows)))
    return {"path": "json", "data_files": str(path)} | fields


@pytest.mark.parametrize("shares", [None, (0.5, 0.5), (3, 1), (1.0, 0.0)])
def test_mixtures_equal_trl(tmp_path, shares):
    trl_utils = pytest.importorskip("trl.scripts.utils")
    sizes = {"a": 10, "b": 4}
    entries = [entry(tmp_path, name, rows) for name, rows in sizes.items()]
    for given, share in zip(entries, shares or (), strict=False):
        given["fraction"] = share
    ours = get_dataset(DatasetMixtureConfig(datasets=[dict(e) for e in entries]))
    theirs = trl_utils.get_dataset(trl_utils.DatasetMixtureConfig(datasets=[dict(e) for e in entries]))
    assert list(ours["train"]) == list(theirs["train"])
    counts = {None: (10, 4), (0.5, 0.5): (4, 4), (3, 1): (10, 3), (1.0, 0.0): (10, 0)}[shares]
    assert [row["from"] for row in ours["train"]] == ["a"] * counts[0] + ["b"] * counts[1]


def test_mixture_of_files_renames_streams_and_holds_out(tmp_path):
    path = write(tmp_path, "jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    entries = [DatasetConfig(path, columns={"prompt": "question", "completion": "answer"}), DatasetConfig(str(other))]
    expected = [{"prompt": r["question"], "completion": r["answer"]} for r in ROWS] + [
        {"prompt": "p", "completion": "c"}
    ]
    for streaming in (False, True):
        mixture = DatasetMixtureConfig(datasets=list(entries), streaming=streaming)
        assert list(get_dataset(mixture)["train"]) == expected
    split = get_dataset(DatasetMixtureConfig(datasets=entries, test_split_size=3))
    parts = {name: {row["prompt"] for row in rows} for name, rows in split.items()}
    assert len(parts["test"]) == 3 and parts["train"] | parts["test"] == {row["prompt"] for row in expected}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"datasets": []}, "empty"),
        (
            {"datasets": [{"path": "a", "fraction": 1}, {"path": "b"}]},
            r"for all datasets .* or for none; .*\[1, None\]",
        ),
        ({"datasets": [{"path": "a", "fraction": 1}], "streaming": True}, "no length"),
        ({"datasets": [{"path": "a", "fraction": -1}]}, "negative"),
        ({"datasets": [{"path": "a"}], "streaming": True, "test_split_size": 0.5}, "no length"),
        ({"datasets": [{"path": "a", "fractoin": 1}]}, "'fractoin'; did you mean 'fraction'"),
        ({"datasets": [{"split": "a"}]}, "no `path`"),
    ],
)
def test_wrong_mixtures_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        get_dataset(DatasetMixtureConfig(**change))
