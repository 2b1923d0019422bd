"""Chat templates against TRL's functions, its copies of the models' templates, and marks worked out by hand."""

import copy
import random
from pathlib import Path

import pytest
from tiny import CHATML, tiny_model, tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fastalign.data import chat
from fastalign.data.training_templates import FAMILIES, INSERTIONS, training_template

trl = pytest.importorskip("trl")
from trl import chat_template_utils as trl_chat  # noqa: E402
from trl import data_utils as trl_data  # noqa: E402

FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
OURS = {  # TRL's name of the model's own template -> our family
    "cohere": "cohere",
    "deepseekv3": "deepseekv3",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "glm4moe": "glm4moe",
    "gptoss": "gptoss",
    "llama3": "llama3",
    "llama3_1": "llama3.1",
    "llama3_2": "llama3.1",
    "phi3": "phi3",
    "phi3_5": "phi3.5",
    "qwen2_5": "qwen2.5",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "qwen3-instruct-2507",
    "qwen3_vl": "qwen3-vl",
    "qwen3_5_think": "qwen3.5",
    "qwen3_5_nothink": "qwen3.5",
    "qwen3_6": "qwen3.6",
    "qwen3_8": "qwen3.8",
    "lfm2": "lfm2",
    "lfm2_v2": "lfm2.v2",
}
TOOLED = {"deepseekv3", "glm4moe", "gptoss", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2"}
TOOLED |= {"qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"}
WITHOUT_SYSTEM = {"gemma"}
GENERATION_MARKS = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}",
)


def template(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer(chat_template):
    fresh = copy.deepcopy(tiny_tokenizer())
    fresh.chat_template = chat_template
    return fresh


def render(text, messages, **arguments):
    texts, spans = render_jinja_template(
        conversations=[messages], chat_template=text, return_assistant_tokens_mask=True, **SPECIAL, **arguments
    )
    marks = [0] * len(texts[0])
    for start, end in spans[0]:
        marks[start:end] = [1] * (end - start)
    return texts[0], "".join(c for c, mark in zip(texts[0], marks, strict=True) if mark), marks


def conversation(rng, name):
    words = ["so", " well ", "\nhm\n", "é<b>", "yes", ""]
    messages = []
    if name not in WITHOUT_SYSTEM and rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(words)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(words)})
        if name in TOOLED and rng.random() < 0.5:
            calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": rng.choice([1, "x", [2]])}}}]
            messages.append({"role": "assistant", "content": rng.choice(["", "see"]), "tool_calls": calls})
            messages.append({"role": "tool", "content": "out"})
        messages.append({"role": "assistant", "content": rng.choice(words)})
        if name in ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8") and rng.random() < 0.5:
            messages[-1]["content"] = "<think>\nhm\n</think>\n\n" + messages[-1]["content"]
    return messages


@pytest.mark.parametrize("name", OURS)
def test_family_is_recognised_and_renders_as_its_own_template(name):
    family, ours = training_template(template(name), SPECIAL)
    assert family == OURS[name]
    rng = random.Random(0)
    for _ in range(20):
        messages = conversation(rng, name)
        arguments = {"add_generation_prompt": rng.random() < 0.3}
        expected = render(template(name), messages, **arguments)[0] if name != "deepseekv3" else None
        if expected is None:  # its own template takes arguments as strings only
            messages = [
                {**m, "tool_calls": [{**m["tool_calls"][0], "function": {"name": "f", "arguments": '{"a": 1}'}}]}
                if "tool_calls" in m
                else m
                for m in messages
            ]
            expected = render(template(name), messages, **arguments)[0]
        assert render(ours, messages, as_shipped=True, **arguments)[0] == expected


@pytest.mark.parametrize("name", [name for name in OURS if (FOLDER / f"{name}_training.jinja").exists()])
def test_training_template_renders_and_marks_as_trl_does(name):
    ours = training_template(template(name), SPECIAL)[1]
    rng = random.Random(1)
    for _ in range(30):
        messages = conversation(rng, name)
        assert render(ours, messages) == render(template(f"{name}_training"), messages)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llama_tool_calls_are_marked_without_their_header(name):
    ours = training_template(template(name), SPECIAL)[1]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": " done "},
    ]
    assert render(ours, messages)[1] == '{"name": "f", "parameters": {"a": 1}}<|eot_id|>done<|eot_id|>'


@pytest.mark.parametrize(
    "own, family",
    [
        (CHATML, "chatml"),
        ("{% set m = messages %}" + CHATML.replace("messages %}", "m %}"), "chatml"),  # the same in other words
        (
            "{% if messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + CHATML,
            "qwen2",
        ),
        (
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\\nYou are a helpful "
            "AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}{{ "
            "'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
            "smollm2",
        ),
    ],
)
def test_chatml_relatives_are_told_apart(own, family):
    found, ours = training_template(own, SPECIAL)
    assert found == family
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render(ours, messages)[0] == render(own, messages)[0]
    assert render(ours, messages)[1] == "b<|im_end|>\n"


def test_every_family_has_a_test():
    assert set(OURS.values()) | {"chatml", "qwen2", "smollm2"} == {*FAMILIES, *INSERTIONS}


def test_get_training_chat_template():
    assert chat.get_training_chat_template(tokenizer(GENERATION_MARKS)) is None
    assert chat.has_generation_markers(chat.get_training_chat_template(tokenizer(CHATML)))
    named = tokenizer({"default": template("llama3"), "rag": "x"})
    assert chat.has_generation_markers(chat.get_training_chat_template(named))
    for unknown in (
        CHATML.replace("im_start", "start"),
        CHATML.replace("message['content']", "message['content']|trim"),
    ):
        with pytest.raises(ValueError, match=r"generation.*chat_template_path"):
            chat.get_training_chat_template(tokenizer(unknown))
    with pytest.raises(ValueError, match="no chat template"):
        chat.get_training_chat_template(tokenizer(None))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_probes_judge_every_template_as_trl_does(path):
    given = tokenizer(path.read_text(encoding="utf-8"))
    given.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|end|>", "<|user|>"]})
    assert chat.has_generation_markers(given.chat_template) == trl_chat.has_generation_markers(given.chat_template)
    for name in ("supports_tool_calling", "is_chat_template_stop_token_trained", "is_chat_template_prefix_preserving"):
        ours, theirs = getattr(chat, name), getattr(trl_chat, name)
        try:
            expected = theirs(given)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(given)
        else:
            assert ours(given) == expected, name


U, A = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "four"}
B = {"role": "assistant", "content": "five"}
ROWS = [
    {"messages": [U, A]},
    {"prompt": [U]},
    {"prompt": [U, A]},
    {"prompt": [U, {"role": "tool", "content": "x"}]},
    {"prompt": [U], "completion": [A]},
    {"prompt": [U], "completion": [A], "label": False},
    {"prompt": [U], "chosen": [A], "rejected": [B]},
    {"chosen": [U, A], "rejected": [U, B]},
    {"prompt": [U, A], "completion": [B]},
    {"prompt": [U], "completion": [A], "chat_template_kwargs": {"enable_thinking": False}},
    {"text": "plain"},
]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "glm4moe", None])
@pytest.mark.parametrize("row", ROWS)
def test_apply_chat_template_equals_trl(name, row):
    given = tokenizer(template(name) if name else CHATML)
    for tools in (None, [], [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        ours = chat.maybe_apply_chat_template(row, given, tools)
        assert ours == trl_data.maybe_apply_chat_template(row, given, tools)


def test_apply_chat_template_names_what_it_cannot_use():
    given = tokenizer(CHATML)
    with pytest.raises(KeyError, match="completion"):
        chat.apply_chat_template({"completion": [A]}, given)
    with pytest.raises(ValueError, match="system"):
        chat.apply_chat_template({"prompt": [{"role": "system", "content": "x"}]}, given)


def test_clone_chat_template_equals_trl(tmp_path):
    source = tokenizer(template("llama3"))
    source.add_special_tokens({"eos_token": "<|eot_id|>", "additional_special_tokens": ["<|start_header_id|>"]})
    source.save_pretrained(tmp_path)
    results = []
    for clone in (chat.clone_chat_template, trl_chat.clone_chat_template):
        model, target, added = clone(tiny_model("llama"), tokenizer(CHATML), str(tmp_path))
        rows = model.get_input_embeddings().weight.shape[0]
        results.append(
            (target.chat_template, target.get_vocab(), target.eos_token, added, rows, model.config.eos_token_id)
        )
    assert results[0] == results[1]
    assert results[0][4] % 64 == 0 and results[0][4] == len(results[0][1])
