"""The embedded engine on prompts with images: what it samples is what a plain forward says."""

import copy

import numpy as np
import pytest
import torch
import transformers
from test_vision_groups import END, IMAGE, LONGEST, loaded, rows
from test_vision_pairs import _Patches
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastalign import prepare_policy
from fastalign.policy import token_stats
from fastalign.rollout.buffer import Experience
from fastalign.rollout.chat_tokens import ChatTokens
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.group_batches import GroupCollator
from fastalign.rollout.native import NativeEngine


def sampled(engine: NativeEngine, requests: list[Request]) -> dict:
    return {completion.key: completion for completion in generate(engine, requests)}


def requests_of(tokens: ChatTokens, given: list[dict], sampling: Sampling, times: int = 2) -> list[Request]:
    made = []
    for i, row in enumerate(given):
        _, ids, inputs = tokens.with_images(row)
        made += [Request((i, j), ids, sampling, 100 * i + j, inputs) for j in range(times)]
    return made


def own_logps(model, request: Request, ids: list[int]) -> torch.Tensor:
    """Of the model's plain forward on prompt, images and completion, without padding."""
    inputs, start = dict(request.model_inputs), len(request.prompt_ids)
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(ids)))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*request.prompt_ids, *ids]]), **inputs).logits[0]
    return logits.log_softmax(-1)[torch.arange(start - 1, start - 1 + len(ids)), ids]


def test_sampled_log_probabilities_are_the_models_own():
    """One, two and no images; alone, together, and after the engine has slept in between."""
    processor, model = loaded()
    plain = copy.deepcopy(model)
    prepare_policy(model)
    requests = requests_of(
        ChatTokens(processor), rows(6, "mixed"), Sampling(LONGEST, stop_ids=(END,), banned=(IMAGE,))
    )
    found = sampled(NativeEngine(model), requests)
    for request in requests:
        completion = found[request.key]
        logps = own_logps(plain, request, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.logps), logps, rtol=1e-5, atol=1e-5)
        assert sampled(NativeEngine(model), [request])[request.key].ids == completion.ids
    engine, slept = NativeEngine(model, tokens_per_step=2, max_rows=5), {}
    engine.submit(requests)
    while engine.pending:
        slept |= {completion.key: completion for completion in engine.step()}
        engine.sleep()
    assert {key: one.ids for key, one in slept.items()} == {key: one.ids for key, one in found.items()}
    assert engine._used() == 0


def test_greedy_completions_are_those_of_generate():
    processor, model = loaded()
    plain = copy.deepcopy(model)
    prepare_policy(model)
    requests = requests_of(ChatTokens(processor), rows(5), Sampling(8, temperature=0.0, banned=(IMAGE,)), 1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        made = plain.generate(input_ids=ids, **request.model_inputs, suppress_tokens=[IMAGE], **options)
        found = sampled(NativeEngine(model), requests)[request.key]
        assert found.ids == made[0, len(request.prompt_ids) :].tolist()
        logps = own_logps(plain, request, found.ids)
        torch.testing.assert_close(torch.tensor(found.logps), logps, rtol=1e-5, atol=1e-5)


def test_tokens_of_images_are_never_drawn():
    """However likely they are; what is drawn has the log-probability that the model gives it."""
    processor, model = loaded()
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = 3 * model.lm_head.weight[7]
    plain = copy.deepcopy(model)
    prepare_policy(model)
    for settings in ({}, {"top_k": 3}, {"temperature": 0.0}):
        requests = requests_of(ChatTokens(processor), rows(3), Sampling(20, banned=(IMAGE,), **settings), 4)
        found = sampled(NativeEngine(model), requests)
        for request in requests:
            assert IMAGE not in found[request.key].ids
            if "top_k" not in settings:
                logps = own_logps(plain, request, found[request.key].ids)
                torch.testing.assert_close(torch.tensor(found[request.key].logps), logps, rtol=1e-5, atol=1e-5)
    requests = requests_of(ChatTokens(processor), rows(3), Sampling(20), 4)
    assert any(IMAGE in one.ids for one in sampled(NativeEngine(model), requests).values())


def test_positions_of_images_go_on_in_the_completion():
    """Qwen2-VL: rotary positions in three axes, images of several sizes, rows that leave and rows that come back."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"vocab_size": 331, "intermediate_size": 48, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, vision_start_token_id=3)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    plain = copy.deepcopy(model)
    prepare_policy(model)
    requests = []
    for i, images in enumerate([[(1, 2, 4)], [(2, 4, 4), (3, 2, 2)], [(4, 6, 2)], []]):
        made = _Patches()(["what is this " * (i + 1)], [images])
        ids = made.pop("input_ids")[0].tolist()
        del made["attention_mask"]
        sampling = Sampling(6 + 3 * i, banned=(5,))
        requests += [Request((i, j), ids, sampling, 10 * i + j, made) for j in range(2)]
    found, again = sampled(NativeEngine(model), requests), {}
    engine = NativeEngine(model, tokens_per_step=4, max_rows=3)
    engine.submit(requests)
    while engine.pending:
        again |= {completion.key: completion for completion in engine.step()}
        engine.sleep()
    for request in requests:
        completion = found[request.key]
        assert len(completion.ids) == request.sampling.max_new_tokens
        logps = own_logps(plain, request, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.logps), logps, rtol=1e-4, atol=1e-4)
        assert again[request.key].ids == completion.ids


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {  # family -> config; its prompts have four tokens for each image
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=SMALL | {"vocab_size": 340, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
        vision_config=SMALL | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
    ),
    "idefics3": lambda: transformers.Idefics3Config(
        image_token_id=IMAGE,
        vision_config=SMALL | {"image_size": 16, "patch_size": 4},
        text_config=SMALL | {"model_type": "llama", "vocab_size": 340},
        scale_factor=2,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_what_processors_make_is_joined_as_each_family_reads_it(family):
    """Gemma 3: types of tokens make images bidirectional. Idefics 3: a table of images per row, filled with zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(OTHERS[family]()).eval()
    plain, requests = copy.deepcopy(model), []
    prepare_policy(model)
    for i, count in enumerate((1, 2)):
        ids = [11, *([IMAGE] * 4 + [12 + i]) * count]
        if family == "gemma3":
            types = (torch.tensor([ids]) == IMAGE).long()
            inputs = {"pixel_values": torch.randn(count, 3, 16, 16), "token_type_ids": types}
        else:
            inputs = {"pixel_values": torch.randn(1, count, 3, 16, 16)}
            inputs["pixel_attention_mask"] = torch.ones(1, count, 16, 16, dtype=torch.int64)
        requests.append(Request(i, ids, Sampling(9 - i, banned=(IMAGE,)), i, inputs))
    found = sampled(NativeEngine(model), requests)
    wanted = [own_logps(plain, request, found[request.key].ids) for request in requests]
    for request, logps in zip(requests, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(found[request.key].logps), logps, rtol=1e-5, atol=1e-5)
    experiences = []
    for request in requests:
        ids = np.array(found[request.key].ids)
        given = {"model_inputs": request.model_inputs}
        experiences.append(Experience(np.array(request.prompt_ids), ids, np.arange(len(ids)), request.key, **given))
    with torch.no_grad():
        logps = token_stats(model, GroupCollator(pad_token_id=0, flat=False)(experiences)).stats.logp
    torch.testing.assert_close(logps, torch.cat(wanted), rtol=1e-5, atol=1e-5)
