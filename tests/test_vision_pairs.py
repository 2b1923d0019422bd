"""Preferences on images: DPO and KTO log what TRL logs, and an answer scores what the plain model gives it alone."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_vision import _model, _processor
from tiny import tiny_tokenizer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

trl = pytest.importorskip("trl")

import fastalign  # noqa: E402
from fastalign import prepare_policy  # noqa: E402
from fastalign.data.pair_batches import AnswerCollator, UnpairedCollator  # noqa: E402
from fastalign.data.vision_pairs import VisionAnswerCollator  # noqa: E402
from fastalign.policy import token_stats  # noqa: E402
from fastalign.unpaired import every_second  # noqa: E402

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order
SUM_ERROR = 5e-6  # absolute, of what follows from the difference of two sums of log-probabilities of about 50 nats
APART = ("runtime", "per_second", "total_flos", "preparation_time", "health/")  # parts of keys that TRL lacks or times


def _picture(i: int, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, 24, 3), dtype=np.uint8))


def _say(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def pairs(form: str = "chat", n: int = 9) -> Dataset:
    """One image each; "chat", "text" or "implicit" (conversations without `prompt`)."""
    rows = []
    for i in range(n):
        question, chosen, rejected = "what is this " * (1 + i % 3), "a thing " * (1 + i % 4), "no idea " * (1 + i % 2)
        if form == "text":
            row = {"prompt": "<image> " + question, "chosen": chosen, "rejected": rejected, "images": [_picture(i)]}
        else:
            ask, row = _say("user", question), {"image": _picture(i)}
            begin = ask if form == "implicit" else []
            row |= {"chosen": begin + _say("assistant", chosen), "rejected": begin + _say("assistant", rejected)}
            row |= {} if begin else {"prompt": ask}
        rows.append(row)
    return Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})


def judged(form: str = "chat", n: int = 9) -> Dataset:
    data = pairs(form, n).remove_columns("rejected").rename_column("chosen", "completion")
    return data.add_column("label", [i % 3 != 1 for i in range(n)])


@cache
def _loaded():
    processor = _processor()
    policy, reference = _model(processor), _model(processor)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    return processor, policy, reference


def make(library, kind: str, folder, form="chat", data=None, evaluation=None, **given):
    """A trainer of DPO or KTO ("kind"), made of config fields and constructor arguments."""
    config = getattr(library, f"{kind}Config")
    arguments = {name: given.pop(name) for name in list(given) if name not in config.__dataclass_fields__}
    processor, policy, reference = (copy.deepcopy(x) for x in _loaded())
    fields = {"per_device_train_batch_size": 3, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    fields |= {"bf16": False, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    fields |= {"output_dir": str(folder), "train_sampling_strategy": "sequential", "per_device_eval_batch_size": 3}
    arguments = {"processing_class": processor} | arguments
    if "peft_config" not in arguments:
        arguments["ref_model"] = reference
    return getattr(library, f"{kind}Trainer")(
        policy,
        args=config(**(fields | given)),
        train_dataset=(pairs if kind == "DPO" else judged)(form) if data is None else data,
        eval_dataset=evaluation,
        **arguments,
    )


def history(trainer) -> list[dict]:
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    log = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(part in k for part in APART)} for entry in log]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        for key in own:
            error = SUM_ERROR if "rewards/" in key or "logits/" in key or key.endswith("kl") else 1e-7
            assert math.isclose(own[key], other[key], rel_tol=PARITY_RTOL, abs_tol=error), (key, own, other)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


CASES = {  # name -> (trainer, form of the data, settings)
    "pairs": ("DPO", "chat", {"evaluation": lambda: pairs(n=4)}),
    "pairs of texts": ("DPO", "text", {"max_length": 30, "gradient_accumulation_steps": 2}),
    "pairs, adapter off": ("DPO", "chat", {"peft_config": lora}),
    "judged": ("KTO", "chat", {"evaluation": lambda: judged(n=4)}),
    "judged texts": ("KTO", "text", {"loss_type": "apo_zero_unpaired", "max_length": 30}),
    "judged, adapter off": ("KTO", "chat", {"peft_config": lora}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    kind, form, settings = CASES[case]
    logs = []
    for library in (fastalign, trl):
        given = {name: value() if callable(value) else value for name, value in settings.items()}
        logs.append(history(make(library, kind, tmp_path / library.__name__, form, **given)))
    assert_same(*logs)


def test_other_ways_to_the_same_run(tmp_path):
    """A stream, an implicit prompt, wider padding and TRL's collator change no number."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    plain = history(make(fastalign, "DPO", tmp_path))
    for settings in (
        {"data": pairs().to_iterable_dataset()},
        {"form": "implicit"},
        {"pad_to_multiple_of": 16},
        {"data_collator": DataCollatorForVisionPreference(_processor())},
    ):
        found = history(make(fastalign, "DPO", tmp_path, **settings))
        assert_same(*([{k: v for k, v in e.items() if k != "epoch"} for e in log] for log in (found, plain)))


def test_predictions_are_chosen_then_rejected(tmp_path):
    trainer = make(fastalign, "DPO", tmp_path)
    found = trainer.predict(pairs(n=3))
    decode = trainer.loaded.tokenizer.decode
    answers = [decode(ids[ids != -100]) for ids in found.label_ids]
    chosen, rejected = (["a thing " * n + "</s>" for n in (1, 2, 3)], ["no idea " * n + "</s>" for n in (1, 2, 1)])
    assert answers == chosen + rejected
    assert len(found.predictions) == 6


# Batches


def test_an_answer_scores_what_the_model_gives_it_alone():
    """Rows of one, two and no images, padded to a multiple and cut; every answer by hand."""
    processor, model, _ = (copy.deepcopy(x) for x in _loaded())
    prepare_policy(model, allow_flat=False)
    rows = [
        {"images": [_picture(i + 10 * k, 18 + i) for k in range(count)], "prompt": _say("user", "what " * (1 + i))}
        | {name: _say("assistant", text * (1 + i)) for name, text in (("chosen", "a thing "), ("rejected", "no "))}
        for i, count in enumerate((1, 2, 0))
    ]
    options = {"pad_token_id": 0, "flat": False, "pad_to_multiple_of": 8, "max_length": 26, "vocab_size": 10}
    batch = VisionAnswerCollator(processor, AnswerCollator(("chosen", "rejected"), **options))(rows)
    sums = torch.zeros(6).index_add_(0, batch.row, token_stats(model, batch).stats.logp)
    assert batch.input_ids.shape[1] % 8 == 0 and batch.model_inputs["pixel_values"].shape[0] == 6
    lengths, tokens = [], 0
    for number, (row, name) in enumerate((row, name) for row in rows for name in ("chosen", "rejected")):
        text = f"user: {'<image>' * len(row['images'])}{row['prompt'][0]['content']}</s>assistant: "
        options = {"return_tensors": "pt", "add_special_tokens": False}
        prompt = processor(images=row["images"] or None, text=[text], **options)
        answer = processor.tokenizer(row[name][0]["content"] + "</s>", **options)["input_ids"][0]
        start = prompt["input_ids"].shape[1]
        answer = answer[: 26 - start]
        ids = torch.cat([prompt["input_ids"][0], answer])[None]
        pixels = {"pixel_values": prompt["pixel_values"]} if row["images"] else {}
        with torch.no_grad():
            logits = _loaded()[1](input_ids=ids, **pixels).logits[0]
        logp = logits.log_softmax(-1)[torch.arange(start - 1, ids.shape[1] - 1), answer].sum()
        torch.testing.assert_close(sums[number], logp, rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.targets[batch.row == number], answer)
        lengths.append(len(answer))
        tokens += ids.shape[1]
    assert batch.extras["lengths"].tolist() == lengths and batch.num_tokens == tokens
    assert len(set(lengths)) > 2


class _Patches:
    """A processor in the manner of Qwen2-VL's: images are (seed, height, width) in patches, their tensors are flat."""

    image_token_id = 5

    def __init__(self):
        self.tokenizer = tiny_tokenizer()

    def __call__(self, text, images=None, **_) -> dict:
        made, ids = {}, []
        for words, given in zip(text, images or [[]] * len(text), strict=True):
            row = self.tokenizer(words, add_special_tokens=False)["input_ids"]
            for _, height, width in given:
                row = [3, *[self.image_token_id] * (height * width // 4), 4, *row]
            ids.append(torch.tensor(row))
        flat = [image for given in images or [] for image in given]
        if flat:
            draw = [torch.randn(h * w, 96, generator=torch.Generator().manual_seed(seed)) for seed, h, w in flat]
            made["pixel_values"] = torch.cat(draw)
            made["image_grid_thw"] = torch.tensor([(1, height, width) for _, height, width in flat])
        pad = torch.nn.utils.rnn.pad_sequence
        made["input_ids"] = pad(ids, batch_first=True)
        made["attention_mask"] = pad([torch.ones_like(row) for row in ids], batch_first=True)
        return made | {"mm_token_type_ids": (made["input_ids"] == self.image_token_id).long()}


def test_patches_of_images_reach_their_rows():
    """Qwen2-VL: images of several sizes in one tensor, rotary positions from types of tokens, mismatched answers."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"vocab_size": 331, "intermediate_size": 48, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, vision_start_token_id=3)
    model = Qwen2VLForConditionalGeneration(config).eval()
    plain = copy.deepcopy(model)
    prepare_policy(model, allow_flat=False)
    rows = [
        {"prompt": "what is this", "completion": " a thing", "label": True, "images": [(1, 2, 4)]},
        {"prompt": "and that", "completion": " no idea at all", "label": False, "images": [(2, 4, 4), (3, 2, 2)]},
        {"prompt": "what", "completion": " it is four", "label": True, "images": [(4, 6, 2)]},
    ]
    processor = _Patches()
    collator = VisionAnswerCollator(processor, UnpairedCollator(kl=True, pad_token_id=0, flat=False))
    batch = collator(rows)
    assert batch.extras["label"].tolist() == [True, False, True]
    whole = torch.zeros(6).index_add_(0, batch.row, token_stats(model, batch).stats.logp)
    for half in range(2):
        part = every_second(batch, half)
        sums = torch.zeros(3).index_add_(0, part.row, token_stats(model, part).stats.logp)
        torch.testing.assert_close(sums, whole[half::2], rtol=1e-5, atol=1e-5)
        for i, row in enumerate(rows):
            answer = processor([rows[i - half]["completion"]])["input_ids"][0]
            made = processor([row["prompt"]], [row["images"]])
            start = made["input_ids"].shape[1]
            made["input_ids"] = torch.cat([made["input_ids"][0], answer])[None]
            made["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"][0], torch.zeros_like(answer)])[None]
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            with torch.no_grad():
                logp = plain(**made).logits[0].log_softmax(-1)
            wanted = logp[torch.arange(start - 1, start - 1 + len(answer)), answer].sum()
            torch.testing.assert_close(sums[i], wanted, rtol=1e-5, atol=1e-5)
    assert batch.num_tokens == int(every_second(batch, 0).attention_mask.sum())


# What is refused


REFUSED = [  # (trainer, settings, words of the error)
    (
        "DPO",
        {"precompute_ref_log_probs": True},
        "`precompute_ref_log_probs=True` is not supported for vision datasets",
    ),
    (
        "KTO",
        {"precompute_ref_log_probs": True},
        "`precompute_ref_log_probs=True` is not supported for vision datasets",
    ),
    ("DPO", {"truncation_mode": "keep_end"}, "`truncation_mode='keep_end'` is not supported for vision datasets"),
    ("DPO", {"padding_free": True}, "`padding_free=True` is not supported for vision datasets"),
    ("DPO", {"share_prefix": True}, "`share_prefix=True` is not supported for vision datasets"),
    ("DPO", {"bad_rows": "drop"}, "`bad_rows='drop'` is not supported for vision datasets"),
    ("DPO", {"token_budget": 99}, "add a column 'length'"),
    ("DPO", {"train_sampling_strategy": "group_by_length"}, "add a column 'length'"),
    ("KTO", {"data": lambda: judged().add_column("length", [9] * 9), "token_budget": 99}, "alone in its batch"),
    ("KTO", {"data": pairs}, "has images and pairs"),
    ("KTO", {"data_collator": lambda: list}, "`data_collator` is not supported for vision datasets by KTOTrainer"),
    ("DPO", {"processing_class": tiny_tokenizer}, "has images .* is a plain tokenizer"),
    ("DPO", {"data": lambda: pairs().remove_columns("rejected")}, r"\['rejected'\] missing"),
    ("KTO", {"evaluation": lambda: judged().remove_columns("prompt")}, r"The eval dataset .*\['prompt'\] missing"),
    (
        "DPO",
        {"data": lambda: _with(pairs(), "chosen", 3, None)},
        r"Row 3 of the train dataset has no value in `chosen`",
    ),
    ("DPO", {"evaluation": lambda: _with(pairs(), "prompt", 5, None)}, "Row 5 of the eval dataset .* `dataset.filter"),
    ("KTO", {"data": lambda: _with(judged(), "label", 2, None)}, "Row 2 of the train dataset has no value in `label`"),
    ("KTO", {"data": lambda: _with(judged(), "label", 4, -1)}, "`label` holds -1 in row 4"),
]


def _with(data: Dataset, column: str, row: int, value) -> Dataset:
    """The dataset with another value at one place (labels as numbers)."""
    values = [int(v) if isinstance(v, bool) else v for v in data[column]]
    return data.remove_columns(column).add_column(column, [*values[:row], value, *values[row + 1 :]])


@pytest.mark.parametrize("kind, settings, message", REFUSED)
def test_what_images_do_not_go_with_is_refused(kind, settings, message, tmp_path):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        make(fastalign, kind, tmp_path, **settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": None}, "Row 1 of a batch with images has no value in prompt.*dataset.filter"),
        ({"rejected": None}, r"no value in \['rejected'\]"),
        ({"chosen": 3}, "Row 1 .*got {'chosen': 'int'}.*dataset.map"),
        ({}, "`max_length=3` cuts image tokens off"),
    ],
)
def test_rows_that_cannot_be_used_are_named(change, message):
    collator = AnswerCollator(("chosen", "rejected"), pad_token_id=0, flat=False, max_length=3)
    first, second = pairs("text", 2)
    with pytest.raises(ValueError, match=message):
        VisionAnswerCollator(_loaded()[0], collator)([first, second | change])


def test_labels_of_streams_and_lone_rows_are_not_taken_silently(tmp_path, caplog):
    collator = VisionAnswerCollator(_loaded()[0], UnpairedCollator(kl=True, pad_token_id=0, flat=False))
    rows = [row | {"label": label} for row, label in zip(judged("text", 2), (1, 5), strict=True)]
    with pytest.raises(ValueError, match="`label` holds 5 in row 1; allowed are true"):
        collator(rows)
    make(fastalign, "KTO", tmp_path, data=judged(n=4))
    assert "The last batch of 4 rows with `per_device_train_batch_size=3` has one row" in caplog.text
