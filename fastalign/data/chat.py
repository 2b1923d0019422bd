"""Chat templates: applying one to a row of any conversational format, checking one, and taking one over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .formats import is_conversational, prepare_multimodal_messages
from .training_templates import training_template

ProcessingClass: TypeAlias = Any  # PreTrainedTokenizerBase | ProcessorMixin

_TEMPLATED = (  # the sets of columns a template can be applied to
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completion", "label"},
)


def apply_chat_template(
    example: Mapping[str, Any],
    processing_class: ProcessingClass,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Render the messages of a row; `messages` becomes `text`, the other columns keep their names.

    A prompt that ends with the user or a tool gets the generation prompt, one that ends with the assistant is
    continued. Prompt and completions are cut where the rendered prompt and the rendered whole part, so that they join
    without a seam. The row's own `chat_template_kwargs` are passed on. KeyError for columns that form no
    conversational format, ValueError for a prompt that ends with another role.
    """
    columns = {name for name in ("prompt", "chosen", "rejected", "completion", "messages", "label") if name in example}
    if columns not in _TEMPLATED:
        raise KeyError(f"The columns {sorted(columns)} are no conversational format; allowed are {_TEMPLATED}.")
    arguments = (example.get("chat_template_kwargs") or {}) | template_kwargs

    def render(messages: list[dict[str, Any]], **more: Any) -> str:
        return processing_class.apply_chat_template(
            messages,
            tools=tools or None,  # Llama renders its tool preamble for an empty list
            tokenize=False,
            **arguments,
            **more,
        )

    if "messages" in columns:
        return {"text": render(example["messages"])}
    output: dict[str, Any] = {}
    endings = [name for name in ("chosen", "rejected", "completion") if name in columns]
    if "prompt" not in columns:
        return {name: render(example[name]) for name in endings}
    last_role = example["prompt"][-1]["role"]
    if last_role not in ("user", "tool", "assistant"):
        raise ValueError(f"The prompt ends with role {last_role!r}; it must end with user, tool or assistant.")
    goes_on = last_role == "assistant"
    prompt = render(example["prompt"], add_generation_prompt=not goes_on, continue_final_message=goes_on)
    whole = {name: render(example["prompt"] + example[name]) for name in endings}
    prompt = shared_start(prompt, *whole.values())
    output = {"prompt": prompt} | {name: text[len(prompt) :] for name, text in whole.items()}
    if "label" in columns:
        output["label"] = example["label"]
    return output


def shared_start(text: str, *others: str) -> str:
    """The longest beginning of `text` that all `others` have too."""
    for other in others:
        if not other.startswith(text):
            ends = zip(text, other, strict=False)
            text = text[: next((i for i, (a, b) in enumerate(ends) if a != b), len(other))]
    return text


def maybe_apply_chat_template(
    example: Mapping[str, Any],
    processing_class: ProcessingClass,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> Mapping[str, Any]:
    """`apply_chat_template` for a conversational row; any other row comes back as it is."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def has_generation_markers(chat_template: str | Mapping[str, str]) -> bool:
    """Whether the template (of named ones: `default`) marks the assistant's text with `{% generation %}`."""
    if isinstance(chat_template, Mapping):
        chat_template = chat_template["default"]
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", chat_template) is not None


def get_training_chat_template(processing_class: ProcessingClass) -> str | None:
    """A template for training that renders as the tokenizer's own and marks what the assistant says.

    It is also prefix-preserving: a turn reads the same whatever follows it. None when the tokenizer's own template is
    both already. ValueError when the template belongs to no family we know.
    """
    own = processing_class.chat_template
    if own is None:
        raise ValueError("The tokenizer has no chat template: set `chat_template_path` or `tokenizer.chat_template`.")
    own = own["default"] if isinstance(own, Mapping) else own
    steady = not supports_tool_calling(processing_class) or is_chat_template_prefix_preserving(processing_class)
    if steady and has_generation_markers(own):
        return None
    found = training_template(own, _tokenizer_of(processing_class).special_tokens_map)
    if found is None:
        raise ValueError(
            "The chat template is not ready for training (it has no `{% generation %}` marks, or a turn changes with "
            "what follows) and it renders like no family we have a training template for. Put "
            "`{% generation %}...{% endgeneration %}` around the assistant's text in the template and set it with "
            "`tokenizer.chat_template = ...` or `chat_template_path`."
        )
    return found[1]


def _tokenizer_of(processing_class: ProcessingClass) -> Any:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def supports_tool_calling(processing_class: ProcessingClass) -> bool:
    """Whether the template shows the whole of a tool exchange: the call's name, its arguments and the result."""
    if processing_class.chat_template is None:
        return False
    name, key, value, result = marks = ("tool_name_5d1f", "tool_key_93ab", "tool_value_c07e", "tool_result_71d4")
    for arguments in ({key: value}, f'{{"{key}": "{value}"}}'):  # some templates (DeepSeek V3) take only strings
        messages = _tool_exchange(processing_class, name, arguments, result)
        try:
            rendered = processing_class.apply_chat_template(messages, tokenize=False)
        except TemplateError:
            return False
        except TypeError:
            continue
        return all(mark in rendered for mark in marks)
    return False


def _tool_exchange(processing_class: ProcessingClass, name: str, arguments: Any, result: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
    ]
    return prepare_multimodal_messages(messages) if isinstance(processing_class, ProcessorMixin) else messages


def is_chat_template_prefix_preserving(processing_class: ProcessingClass) -> bool:
    """Whether a tool call is rendered the same before and after the tool's answer arrives."""
    is_processor = isinstance(processing_class, ProcessorMixin)
    for arguments in ({}, "{}"):
        messages = _tool_exchange(processing_class, "dummy", arguments, "dummy")
        if is_processor:  # image tokens are only expanded where there is an image
            from PIL import Image

            messages[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (8, 8))})
        try:
            before = processing_class.apply_chat_template(messages[:2], tokenize=True, return_dict=False)
            after = processing_class.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=True
            )
        except TypeError:
            if arguments == "{}":
                raise
            continue
        if is_processor:
            before, after = before[0], after[0]
        return after[: len(before)] == before
    raise AssertionError("unreachable")


def is_chat_template_stop_token_trained(processing_class: ProcessingClass, chat_template: str | None = None) -> bool:
    """Whether the token that ends an assistant turn is among the marked ones, so that the model learns to stop.

    False for a template without marks, and for one that leaves the end of a turn to the message that follows.
    """
    is_processor = isinstance(processing_class, ProcessorMixin)
    messages: list[dict[str, Any]] = [{"role": role, "content": "dummy"} for role in ("user", "assistant", "user")]
    if is_processor:
        messages = prepare_multimodal_messages(messages)
    try:
        output = processing_class.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=chat_template,
        )
    except (TemplateError, TypeError, ValueError):
        return False
    ids, mask = output["input_ids"], output["assistant_masks"]
    if is_processor:
        ids, mask = ids[0], mask[0]
    tokenizer = _tokenizer_of(processing_class)
    added = set(tokenizer.get_added_vocab().values())
    marked = (token for token, inside in zip(reversed(ids), reversed(mask), strict=False) if inside)
    last = next((token for token in marked if tokenizer.decode([token]).strip()), None)
    return last in added


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Give `tokenizer` the chat template, the missing added tokens and the end token of another tokenizer.

    The model's embeddings grow to the new vocabulary, rounded up to `resize_to_multiple_of`; filler tokens
    `<extra_id_N>` make the tokenizer as large. Returns model, tokenizer and the ids of all added tokens.
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    added = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(added)
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id

    # len(get_vocab()): `vocab_size` leaves added tokens out and differs between tokenizer classes
    model.resize_token_embeddings(new_num_tokens=len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of)
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    number = 0
    while len(tokenizer.get_vocab()) < rows:
        filler = AddedToken(f"<extra_id_{number}>")
        if tokenizer.add_tokens(filler):
            added.append(filler)
        number += 1
    known = tokenizer.get_vocab()
    if len(known) != rows:
        raise RuntimeError(
            f"After cloning the chat template of {source_tokenizer_path!r} the tokenizer has {len(known)} "
            f"tokens and the model {rows} embedding rows; they must be equal."
        )
    return model, tokenizer, [known[token.content] for token in added]
