"""Preparation of preference data: equal to TRL 1.16's row by row, and cases worked by hand."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
from datasets import Dataset, concatenate_datasets
from test_tokenize import PROMPTS, TOOL_TEMPLATE, TOOLS, WORDS, assistant, tokenizer_of, user
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForSequenceClassification, ProcessorMixin

import fastalign
from fastalign.data.pair_batches import AnswerCollator, UnpairedCollator
from fastalign.data.preferences import (
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_unpaired_dataset,
    rotate_completions,
)

trl = pytest.importorskip("trl")

REPLIES = [[assistant(w)] for w in WORDS]
TEXTS = {
    "prompt": [a + b for a in WORDS for b in WORDS],
    "chosen": [w + e for w in WORDS for e in ("", "</s>")] * 4,
    "rejected": [w + " fox" for w in WORDS[::-1]] * 8,
}
CHATS = {"prompt": PROMPTS, "chosen": REPLIES * 8, "rejected": [[assistant(w + "!"), user("no")] for w in WORDS] * 8}
DATA = {
    "text": TEXTS,
    "implicit_text": {
        c: [p + t for p, t in zip(TEXTS["prompt"], TEXTS[c], strict=True)] for c in TEXTS if c[0] != "p"
    },
    "chat": CHATS,
    "implicit_chat": {c: [p + m for p, m in zip(PROMPTS, CHATS[c], strict=True)] for c in ("chosen", "rejected")},
    "tools": CHATS | {"tools": [TOOLS if i % 3 else None for i in range(64)]},
    "json_tools": CHATS
    | {"tools": [json.dumps(TOOLS)] * 64, "chat_template_kwargs": [{"greeting": w} for w in WORDS] * 8},
}
KINDS = ["plain", "bos", "greedy", "merging", "first", "slow"]


def dataset(name):
    return Dataset.from_dict(DATA[name])


def settings(**options):
    from accelerate import PartialState

    PartialState()
    return SimpleNamespace(**({"dataset_num_proc": None, "truncation_mode": "keep_start"} | options))


def dpo_by_trl(data, tokenizer, **options):
    return trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, settings(**options), ""
    )


def columns(data, *names):
    rows = list(data)
    return [[list(map(int, row[name])) for row in rows] for name in names]


def middle(prompts):
    """A `max_length` that some of the prompts fill."""
    return sorted(map(len, prompts))[len(prompts) * 2 // 3] + 1


def padded_rows(batch, num_answers):
    """(ids, 0/1 of targets) of every sequence of a padded batch, answer by answer as TRL orders them."""
    ids, mask = batch.input_ids, batch.attention_mask
    marks = mask.new_zeros(mask.numel())
    marks[batch.source + 1] = 1
    marks = marks.view_as(mask)
    rows = [(i[m > 0].tolist(), k[m > 0].tolist()) for i, k, m in zip(ids, marks, mask, strict=True)]
    return [row for j in range(num_answers) for row in rows[j::num_answers]]


def rows_of_trl(made, prefix=""):
    found = []
    for ids, marks, mask in zip(
        *(made[prefix + n] for n in ("input_ids", "completion_mask", "attention_mask")), strict=True
    ):
        marks[0] = 0  # nothing predicts the first token
        found.append((ids[mask > 0].tolist(), marks[mask > 0].tolist()))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
def test_pairs_equal_trl(name, kind):
    tokenizer = tokenizer_of(kind, TOOL_TEMPLATE)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    expected = columns(dpo_by_trl(dataset(name), tokenizer, max_length=None), *names)
    data = prepare_preference_dataset(dataset(name), tokenizer, max_length=None)
    assert data.column_names == [*names]
    assert columns(data, *names) == expected
    if kind != "plain":
        return
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    cut = middle(expected[0])
    for mode in ("keep_start", "keep_end"):
        limit = {"max_length": cut, "truncation_mode": mode}
        theirs = DataCollatorForPreference(pad_token_id=0, **limit)([*dpo_by_trl(dataset(name), tokenizer, **limit)])
        data = prepare_preference_dataset(dataset(name), tokenizer, **limit)
        ours = AnswerCollator(("chosen", "rejected"), pad_token_id=0, flat=False, **limit)(
            data.with_format("arrow")[:]
        )
        assert padded_rows(ours, 2) == rows_of_trl(theirs)
        assert 8 < len(data) <= 64
        assert (len(data) < 64) == (mode == "keep_start")
        assert ours.num_tokens == int(theirs["attention_mask"].sum())


@pytest.mark.parametrize("kind", ["plain", "merging"])
@pytest.mark.parametrize("name", [*DATA, "unpaired", "unpaired_text"])
def test_unpaired_equal_trl(name, kind):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    tokenizer = tokenizer_of(kind, TOOL_TEMPLATE)
    if name in DATA:
        data = dataset(name)
    else:
        rows = CHATS if name == "unpaired" else TEXTS
        labels = [i % 3 > 0 for i in range(64)]
        data = Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["chosen"], "label": labels})
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    for limit in (None, middle(prepare_unpaired_dataset(data, tokenizer, max_length=None)["prompt_ids"])):
        args = settings(max_length=limit, per_device_train_batch_size=3)
        theirs = trl.KTOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
        ours = rotate_completions(prepare_unpaired_dataset(data, tokenizer, max_length=limit), 3)
        expected = columns(theirs, "prompt_ids", "completion_ids", "KL_completion_ids")
        assert columns(ours, "prompt_ids", "completion_ids", "kl_completion_ids") == expected
        assert ours["label"] == theirs["label"]
        made = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=limit)([*theirs])
        batch = UnpairedCollator(kl=True, pad_token_id=0, flat=False, max_length=limit)(ours.with_format("arrow")[:])
        assert padded_rows(batch, 2) == rows_of_trl(made) + rows_of_trl(made, "KL_")
        assert batch.extras["label"].tolist() == made["label"].tolist()
        assert batch.num_tokens == int(made["attention_mask"].sum())


@pytest.mark.parametrize("kind", ["plain", "bos", "first"])
@pytest.mark.parametrize("name", DATA)
def test_sequences_for_rewards_equal_trl(name, kind):
    tokenizer, data, limit = tokenizer_of(kind, TOOL_TEMPLATE), dataset(name), None
    for _ in range(2):
        args = settings(max_length=limit)
        theirs = trl.RewardTrainer._prepare_dataset(SimpleNamespace(), data, tokenizer, args, "train")
        ours = prepare_reward_dataset(data, tokenizer, max_length=limit)
        prompts, *answers = columns(ours, "prompt_ids", "chosen_ids", "rejected_ids")
        joined = [[p + a for p, a in zip(prompts, column, strict=True)] for column in answers]
        assert joined == columns(theirs, "chosen_ids", "rejected_ids")
        assert all(a and b and (a[0] != b[0] or 1 in (len(a), len(b))) for a, b in zip(*answers, strict=True))
        limit = middle(joined[1])
    assert 8 < len(ours) < 64


@pytest.mark.parametrize("kind", ["plain", "bos", "slow"])
@pytest.mark.parametrize("name", DATA)
def test_cpo_and_orpo_put_bos_and_eos_as_trl(name, kind):
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.cpo import CPOTrainer

    tokenizer = tokenizer_of(kind, TOOL_TEMPLATE)
    limit = middle(prepare_preference_dataset(dataset(name), tokenizer, max_length=None)["prompt_ids"])
    stand_in = SimpleNamespace(is_encoder_decoder=False, processing_class=tokenizer, max_length=limit)
    stand_in.build_tokenized_answer = partial(CPOTrainer.build_tokenized_answer, stand_in)
    expected = []
    for row in dataset(name):
        row = {k: json.loads(v) if k == "tools" and isinstance(v, str) else v for k, v in row.items()}
        row = maybe_apply_chat_template(maybe_extract_prompt(row), tokenizer, tools=row.get("tools"))
        made = CPOTrainer.tokenize_row(stand_in, row)
        if len(made["prompt_input_ids"]) < limit:
            for answer in ("chosen", "rejected"):
                ids, labels = made[f"{answer}_input_ids"], made[f"{answer}_labels"]
                expected.append((ids, [int(label != -100) for label in labels]))
    ours = prepare_preference_dataset(dataset(name), tokenizer, max_length=limit, bos_and_eos=True)
    found = []
    for row in ours:
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            found.append((row["prompt_ids"] + answer, [0] * len(row["prompt_ids"]) + [1] * len(answer)))
    assert 16 < len(found) < 128
    assert found == expected


@pytest.mark.parametrize("name", DATA)
def test_triples_equal_trl(name):
    from trl.experimental.tpo import TPOTrainer

    tokenizer = tokenizer_of("merging", TOOL_TEMPLATE)
    rows = DATA[name]
    gold = {"reference": [r + r if isinstance(r, str) else r for r in rows["chosen"]]}
    data = Dataset.from_dict(rows | gold)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "reference_ids")
    stand_in = SimpleNamespace(_tokenize=TPOTrainer._tokenize)
    theirs = TPOTrainer._prepare_dataset(stand_in, data, tokenizer, settings(), "train")
    ours = prepare_preference_dataset(data, tokenizer, max_length=None, answers=("chosen", "rejected", "reference"))
    assert columns(ours, *names) == columns(theirs, *names)


@pytest.mark.parametrize("name", ["text", "implicit_chat", "json_tools"])
def test_streams_processes_and_ids_give_the_same(name):
    tokenizer = tokenizer_of("plain", TOOL_TEMPLATE)
    data = dataset(name)
    limit = {"max_length": middle(prepare_preference_dataset(data, tokenizer, max_length=None)["prompt_ids"])}
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    expected = columns(prepare_preference_dataset(data, tokenizer, **limit), *names)
    assert 8 < len(expected[0]) < 64
    stream = prepare_preference_dataset(data.to_iterable_dataset(), tokenizer, **limit)
    assert columns(stream, *names) == expected
    assert stream.column_names == [*names]
    assert columns(prepare_preference_dataset(data, tokenizer, num_proc=2, **limit), *names) == expected
    ids = prepare_preference_dataset(data, tokenizer, max_length=None)
    assert columns(prepare_preference_dataset(ids, tokenizer, **limit), *names) == expected
    old = ids.rename_columns({column: column.replace("_ids", "_input_ids") for column in names})
    assert columns(prepare_preference_dataset(old.to_iterable_dataset(), tokenizer, **limit), *names) == expected
    unpaired = prepare_unpaired_dataset(data, tokenizer, **limit)
    assert columns(prepare_unpaired_dataset(ids, tokenizer, **limit), "prompt_ids") == columns(unpaired, "prompt_ids")
    assert [*rotate_completions(unpaired.to_iterable_dataset(), 5)] == [*rotate_completions(unpaired, 5)]


def test_whole_sequences_of_ids():
    data = Dataset.from_dict(
        {"chosen_ids": [[5, 6, 7], [5, 6]], "rejected_ids": [[5, 6, 8, 9], [5, 6]], "margin": [2, 0]}
    )
    tokenizer = tokenizer_of()
    expected = {
        "prompt_ids": [[5, 6], [5]],
        "chosen_ids": [[7], [6]],
        "rejected_ids": [[8, 9], [6]],
        "margin": [2.0, 0.0],
    }
    assert prepare_reward_dataset(data, tokenizer, max_length=None).to_dict() == expected
    assert prepare_preference_dataset(data, tokenizer, max_length=None).to_dict() == expected
    assert prepare_reward_dataset(data, tokenizer, max_length=3)["chosen_ids"] == [[6]]
    assert prepare_preference_dataset(data, tokenizer, max_length=3)["rejected_ids"] == [[8], [6]]


def test_sharegpt_turns():
    tokenizer = tokenizer_of()
    turns = {
        "conversations": [[{"from": "user", "value": "hi"}]],
        "chosen": [{"from": "assistant", "value": "yes"}],
        "rejected": [[{"from": "assistant", "value": "no"}]],
    }
    chat = {"prompt": [[user("hi")]], "chosen": [[assistant("yes")]], "rejected": [[assistant("no")]]}
    expected = prepare_preference_dataset(Dataset.from_dict(chat), tokenizer, max_length=None).to_dict()
    assert prepare_preference_dataset(Dataset.from_dict(turns), tokenizer, max_length=None).to_dict() == expected


BAD = {
    "prompt": ["hi", None, "x" * 30, "hi", "hi", "hi", ""],
    "chosen": [" a", " a", " a", " same", "", None, " a"],
    "rejected": [" b", " b", " b", " same", " b", " b", " b"],
}


def test_bad_rows_are_named_and_treated_by_the_rule(caplog):
    tokenizer, limit = tokenizer_of(), {"max_length": 20}
    with caplog.at_level(logging.INFO):
        kept = prepare_preference_dataset(Dataset.from_dict(BAD), tokenizer, **limit)
    assert len(kept) == 4
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "2 dropped: a column holds no value, or one of another kind than the first row's (row 1, 5)" in text
    assert "1 dropped: the prompt alone fills max_length (row 2)" in text
    assert "1 kept: an answer says nothing (row 4)" in text
    assert "1 kept: its answers are equal, so none is preferred (row 3)" in text
    assert text.count("bad_rows='keep'") == 1
    assert len(prepare_preference_dataset(Dataset.from_dict(BAD), tokenizer, bad_rows="drop", **limit)) == 2
    caplog.clear()
    twice = concatenate_datasets([Dataset.from_dict(BAD)] * 200).to_iterable_dataset()
    stream = prepare_preference_dataset(twice, tokenizer, bad_rows="drop", **limit)
    assert [row["rejected_ids"] for row in stream] == [tokenizer(" b</s>")["input_ids"]] * 400
    assert len(caplog.records) == 1  # of two batches
    assert "(row 3, 10, 17, 24, 31, ...). Rule: bad_rows='drop', rows count from 0 so far" in caplog.text
    with pytest.raises(ValueError, match=r"max_length=20.*\(row 1, 5\).*\(row 2\).*bad_rows='drop'"):
        prepare_preference_dataset(Dataset.from_dict(BAD), tokenizer, bad_rows="error", **limit)
    with pytest.raises(ValueError, match="allowed are keep, drop, error"):
        prepare_preference_dataset(Dataset.from_dict(BAD), tokenizer, bad_rows="skip", **limit)


def test_bad_rows_of_other_forms(caplog):
    tokenizer = tokenizer_of()
    first = {"prompt": [[user("a")]] * 3, "chosen": [None, [], [assistant("b")]], "rejected": [[assistant("c")]] * 3}
    first = prepare_preference_dataset(Dataset.from_dict(first), tokenizer, max_length=None, bad_rows="drop")
    assert first["rejected_ids"] == [tokenizer("c<|im_end|>\n")["input_ids"]]
    caplog.clear()
    chat = {
        "chosen": [
            [user("a"), assistant("b")],
            [user("a"), assistant("b")],
            [user("a"), {"role": None, "content": "x"}],
        ],
        "rejected": [[user("a"), assistant("c")], [user("d"), assistant("c")], [user("a"), assistant("c")]],
    }
    assert len(prepare_preference_dataset(Dataset.from_dict(chat), tokenizer, max_length=None)) == 1
    assert "do not begin with one common prompt (row 1)" in caplog.text
    ids = {"prompt_ids": [[3], None, [3]], "chosen_ids": [[4], [4], []], "rejected_ids": [[5]] * 3}
    assert len(prepare_preference_dataset(Dataset.from_dict(ids), tokenizer, max_length=None)) == 1
    assert "an answer has no tokens (row 2)" in caplog.text
    judged = {"prompt": ["a", "b", "c"], "completion": [" x", " y", ""], "label": [None, True, False]}
    made = prepare_unpaired_dataset(Dataset.from_dict(judged), tokenizer, max_length=None, bad_rows="drop")
    assert made["label"] == [True]
    triple = {"chosen": ["ab", "ab"], "rejected": ["ac", "ac"], "reference": ["ad", "xd"]}
    answers = ("chosen", "rejected", "reference")
    made = prepare_preference_dataset(Dataset.from_dict(triple), tokenizer, max_length=None, answers=answers)
    assert made["prompt_ids"] == [tokenizer("a")["input_ids"]]


def test_labels_and_given_numbers_are_read_or_named(caplog):
    prepare = partial(prepare_unpaired_dataset, processing_class=tokenizer_of(), max_length=None)
    texts = {"prompt": ["a"] * 3, "completion": [" x"] * 3}
    for labels in ([True, False, True], [1, 0, 1], [1.0, 0.0, 1.0]):
        assert prepare(Dataset.from_dict(texts | {"label": labels}))["label"] == [True, False, True]
    for labels in ([1, 0, -1], [0, 1, 5], [0.0, 1.0, 0.5], ["true", "false", "no"]):
        row = 0 if labels[0] == "true" else 2
        for data in (found := Dataset.from_dict(texts | {"label": labels}), found.to_iterable_dataset()):
            with pytest.raises(ValueError, match=rf"`label` holds {labels[row]!r} in row {row}; allowed are true"):
                list(prepare(data))
    caplog.clear()
    judged = {"label": [1.0, float("nan"), 0.0], "ref_logps": [-1.0, -2.0, None]}
    made = prepare(Dataset.from_dict(texts | judged))
    assert (made["label"], made["ref_logps"]) == ([True], [-1.0])
    assert "2 dropped: a column holds no value, or one of another kind than the first row's (row 1, 2)" in caplog.text
    pairs = {"prompt": ["a"] * 3, "chosen": [" b"] * 3, "rejected": [" c"] * 3, "margin": [1.0, None, 2.0]}
    options = {"processing_class": tokenizer_of(), "max_length": None}
    assert prepare_reward_dataset(Dataset.from_dict(pairs), **options)["margin"] == [1.0, 2.0]
    assert len(prepare_preference_dataset(Dataset.from_dict(pairs), **options)) == 3  # which reads no margin
    pairs |= {"ref_chosen_logps": [None, -1.0, -1.0], "ref_rejected_logps": [-1.0, -1.0, float("nan")]}
    with pytest.raises(ValueError, match=r"\(row 0, 2\)"):
        prepare_preference_dataset(Dataset.from_dict(pairs), bad_rows="error", **options)


def test_data_that_cannot_be_used():
    tokenizer = tokenizer_of()
    prepare = partial(prepare_preference_dataset, processing_class=tokenizer, max_length=None)
    images = {"images": [[1]], "prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    with pytest.raises(ValueError, match=r"has images .* a plain tokenizer, which reads none"):
        prepare(Dataset.from_dict(images))
    with pytest.raises(ValueError, match=r"these are read batch by batch"):
        prepare(Dataset.from_dict(images), processing_class=object.__new__(ProcessorMixin))
    with pytest.raises(ValueError, match=r"\['rejected'\] missing"):
        prepare(Dataset.from_dict({"chosen": ["b"], "other": ["c"]}))
    with pytest.raises(ValueError, match="needs a column `label`"):
        prepare_unpaired_dataset(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tokenizer, max_length=None)
    with pytest.raises(ValueError, match="needs a column `prompt`"):
        prepare_unpaired_dataset(Dataset.from_dict({"completion": ["b"], "label": [True]}), tokenizer, max_length=None)
    with pytest.raises(ValueError, match="No row of the train dataset can be used"):
        prepare(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": [None]}))
    with pytest.raises(ValueError, match="with_transform"):
        prepare(dataset("text").with_transform(lambda row: row))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rotate_completions(dataset("text"), 0)


def test_cache_follows_what_decides_the_ids():
    tokenizer, data = tokenizer_of("plain", TOOL_TEMPLATE), dataset("chat")
    prepare = partial(prepare_preference_dataset, data)
    made = prepare(tokenizer, max_length=50)
    assert prepare(tokenizer, max_length=50)._fingerprint == made._fingerprint
    others = [
        prepare(tokenizer, max_length=51),
        prepare(tokenizer, max_length=50, bos_and_eos=True),
        prepare(tokenizer, max_length=50, answers=("rejected", "chosen")),
        prepare(tokenizer, max_length=50, chat_template=TOOL_TEMPLATE.replace("im_start", "im_end")),
        prepare(tokenizer_of("bos"), max_length=50),
        prepare_reward_dataset(data, tokenizer, max_length=50),
    ]
    assert len({made._fingerprint, *(other._fingerprint for other in others)}) == 7


@pytest.mark.parametrize("name", ["DPO", "CPO", "KTO", "Reward"])
def test_trainers_treat_bad_rows_by_the_rule_they_are_given(name, tmp_path):
    data = Dataset.from_dict({"prompt": ["a b", "c d"], "chosen": [" e", ""], "rejected": [" f", " g"]})
    config, trainer = (getattr(fastalign, f"{name}{part}") for part in ("Config", "Trainer"))

    def rows(rule: str) -> int:
        model = tiny_model()
        if name == "Reward":
            model = LlamaForSequenceClassification(type(model.config)(**model.config.to_dict() | {"num_labels": 1}))
        args = config(str(tmp_path), bad_rows=rule, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
        return len(
            trainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer()).train_dataset
        )

    kept = rows("keep")
    assert kept == (4 if name == "KTO" else 2) and rows("drop") < kept
    with pytest.raises(ValueError, match=r"an answer says nothing \(row 1\)"):
        rows("error")
