"""Reward models: completions rendered and tokenised once per tokenizer, scored in micro-batches of flat tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..data.batch import TokenBatch
from ..data.chat import apply_chat_template
from ..data.collate import collate_flat, collate_padded
from ..data.formats import is_conversational
from ..loop.batching import batches_by_length
from ..policy import unwrap
from ..reward_head import prepare_reward_model, read_before_padding, scores
from .samples import Sample

TOKENS_OF_A_BATCH = 16_384  # tokens of a micro-batch; one longer sequence is a batch of its own


def load_reward_model(name: str, **init_kwargs: Any) -> PreTrainedModel:
    """The classification model `name` (folder or Hub id) with one label."""
    return AutoModelForSequenceClassification.from_pretrained(name, **({"num_labels": 1} | init_kwargs))


class RewardModel:
    """A model with a classification head that scores completions; its first label is the reward.

    With `reads_ids` it shares the policy's vocabulary, and is given the ids as sampled instead of their text.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        *,
        device: Any,
        revision: str | None = None,
        reads_ids: bool = False,
    ):
        self.reads_ids = reads_ids
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        config: Any = getattr(unwrap(model), "config", None)
        self.name = (getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__).rstrip("/").split("/")[-1]
        if processing_class is None:
            if not getattr(config, "_name_or_path", ""):
                raise ValueError(
                    f"The reward model {self.name} has no name to load a tokenizer from: pass it in "
                    "`reward_processing_classes`, at the place that the model has in `reward_funcs`."
                )
            processing_class = AutoTokenizer.from_pretrained(config._name_or_path, revision=revision)
        self.processing_class = processing_class
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config is not None:  # the model reads its score at the last token that is not this one
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.flat = isinstance(unwrap(model), PreTrainedModel) and prepare_reward_model(model).flat

    def score(self, rows: list[list[int]]) -> Tensor:
        """The rewards (n,) fp32, on the CPU, of sequences of token ids."""
        found = torch.full((len(rows),), torch.nan)
        lengths = np.array([len(row) for row in rows], np.int64)
        for part in batches_by_length(lengths, TOKENS_OF_A_BATCH, 1, padded=not self.flat):
            found[torch.from_numpy(part)] = self._score([rows[i] for i in part]).float().cpu()
        return found

    @torch.no_grad()
    def _score(self, rows: list[list[int]]) -> Tensor:
        pad = self.tokenizer.pad_token_id
        if not isinstance(unwrap(self.model), PreTrainedModel):
            width = max(map(len, rows))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        if self.flat:
            batch = read_before_padding(_at_ends(collate_flat(rows), rows), pad)
        else:
            batch = _at_ends(collate_padded(rows, pad_token_id=pad), rows)
        return scores(self.model, batch.to(self.device))[:, 0]


def _at_ends(batch: TokenBatch, rows: list[list[int]]) -> TokenBatch:
    """`batch` with each sequence read at its last token."""
    last = torch.tensor([len(row) - 1 for row in rows])
    width = batch.input_ids.shape[1] if batch.is_padded else None
    starts = torch.arange(len(rows)) * width if width else batch.cu_seqlens[:-1].long()
    batch.source = starts + last
    batch.targets, batch.row, batch.weight = torch.zeros_like(last), torch.arange(len(rows)), torch.ones(len(rows))
    return batch


def tokenize(samples: list[Sample], processing_class: Any, template_kwargs: dict[str, Any]) -> list[list[int]]:
    """Prompt and completion of each sample as token ids of `processing_class`, its chat template applied."""
    texts = []
    for sample in samples:
        prompt = sample.row["prompt"]
        if is_conversational({"prompt": prompt}):
            messages = {"messages": [*prompt, *sample.completion]}
            texts.append(apply_chat_template(messages, processing_class, **template_kwargs)["text"])
        else:
            texts.append(prompt + sample.completion)
    return processing_class(text=texts, add_special_tokens=False)["input_ids"]
