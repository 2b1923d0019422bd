"""Images with text: a tiny vision-language model trained here and by TRL logs the same numbers."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_parity_sft import PARITY_RTOL, _assert_same
from tiny import tiny_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

trl = pytest.importorskip("trl")

import fastalign  # noqa: E402
from fastalign.data.vision import VisionCollator  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _processor() -> LlavaProcessor:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = copy.deepcopy(tiny_tokenizer(330))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _model(processor) -> LlavaForConditionalGeneration:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=340, max_position_embeddings=256),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config).eval()


def _data(form: str, n: int = 12) -> Dataset:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        picture = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        question = [{"role": "user", "content": "what is this " * (1 + i % 3)}]
        answer = [{"role": "assistant", "content": "a thing " * (1 + i % 4)}]
        if form == "messages":
            rows.append({"messages": question + answer, "images": [picture]})
        else:
            rows.append({"prompt": question, "completion": answer, "image": picture})
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return Dataset.from_dict(columns)


def _history(library, form: str, folder) -> list[dict]:
    processor = _processor()
    args = library.SFTConfig(
        str(folder),
        per_device_train_batch_size=3,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        bf16=False,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = library.SFTTrainer(_model(processor), args, train_dataset=_data(form), processing_class=processor)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_images_train_as_in_trl(form, tmp_path):
    ours, theirs = _history(fastalign, form, tmp_path / "a"), _history(trl, form, tmp_path / "b")
    _assert_same(ours, theirs, PARITY_RTOL)


def test_completion_only_scores_the_answer():
    rows = [dict(row) for row in _data("prompt-completion", 2)]
    processor = _processor()
    batch = VisionCollator(processor, completion_only_loss=True)(rows)
    for i in range(2):
        targets = batch.targets[batch.row == i]
        assert processor.tokenizer.decode(targets) == rows[i]["completion"][0]["content"] + "</s>"
    assert batch.model_inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_length_limit_keeps_the_start():
    rows = [dict(row) for row in _data("prompt-completion", 3)]
    whole = VisionCollator(_processor())(rows)
    cut = VisionCollator(_processor(), max_length=20)(rows)
    assert cut.input_ids.shape[1] == 20
    assert torch.equal(cut.input_ids, whole.input_ids[:, :20])


def test_images_without_a_processor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images"):
        fastalign.SFTTrainer(
            _model(_processor()),
            fastalign.SFTConfig(str(tmp_path), use_cpu=True),
            train_dataset=_data("messages"),
            processing_class=tiny_tokenizer(),
        )


def test_rows_of_another_form_are_named():
    with pytest.raises(KeyError, match="question"):
        VisionCollator(_processor())([{"question": "x", "image": None}])
