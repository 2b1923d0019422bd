"""Binary classifier optimisation: answers judged good or bad, whose rewards are set apart around a running mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from fastalign_kernels.losses.unpaired import density_ratio_weights, running_mean
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import CausalOnlyArgs
from ..data.batch import TokenBatch
from ..given_data import GivenDataTrainer, passed_on
from ..pairs import PairArgs, with_outputs
from ..reference import ReferenceArgs
from ..unpaired import adapt_judged, judged_collator, prepare_judged, record_unpaired, unpaired_loss

logger = logging.getLogger(__name__)
WEIGHT = "undesirable_weight"  # column: what an undesirable answer's loss is multiplied with
EMBEDDED = 64  # prompts that are embedded at once


@dataclass
class BCOConfig(ReferenceArgs, PairArgs, CausalOnlyArgs, AlignConfig):
    """Settings of BCOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(5e-7, "Initial learning rate.")
    beta: float = arg(0.1, "How strongly the policy is held at the reference.")
    prompt_sample_size: int = arg(
        1024, "Prompts of each label that the classifier of prompts is fitted to (with `embedding_func`)."
    )
    min_density_ratio: float = arg(0.5, "Least weight of an undesirable answer (with `embedding_func`).")
    max_density_ratio: float = arg(10.0, "Largest weight of an undesirable answer (with `embedding_func`).")

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        self.check_causal_only()
        self.check_reference_args()
        if self.prompt_sample_size < 1:
            raise ValueError(f"`prompt_sample_size` is {self.prompt_sample_size}; it must be at least 1 prompt.")
        if not 0 <= self.min_density_ratio <= self.max_density_ratio:
            raise ValueError(
                f"`min_density_ratio` is {self.min_density_ratio} and `max_density_ratio` {self.max_density_ratio}; "
                "they must be at least 0, and the first not larger than the second."
            )


class BCOTrainer(GivenDataTrainer):
    """BCO, arXiv:2404.04656, for a causal language model, given by name, as an object, or with adapters.

    Takes the data of `KTOTrainer`, in any order. With `embedding_func(input_ids=, attention_mask=) -> (B, E)` and
    `embedding_tokenizer`, undesirable answers are weighted by how much their prompt looks like those of desirable ones
    (underlying-distribution matching), once, before training. Metrics are those of KTO, with "delta" in place of "kl":
    the running mean of rewards, which checkpoints keep.
    """

    config_class = BCOConfig
    loss_is_normalized = False
    _name = "BCO"
    _tag_names = ["fastalign", "bco"]
    args: BCOConfig
    answers = ("completion",)
    row_columns = ("label", WEIGHT)
    reference_columns = ("ref_logps",)

    def __init__(
        self,
        model=None,
        ref_model=None,
        args: BCOConfig | TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        model_init=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        peft_config=None,
        compute_metrics=None,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        embedding_func=None,
        embedding_tokenizer=None,
        quantization_config=None,
    ):
        if (embedding_func is None) != (embedding_tokenizer is None):
            raise ValueError("`embedding_func` and `embedding_tokenizer` belong together: give both or none.")
        if model_adapter_name is not None or ref_adapter_name is not None:
            raise ValueError(
                "`model_adapter_name` and `ref_adapter_name` are not supported: the active adapter is trained, and "
                "its frozen copy is the reference. Leave them out."
            )
        self._embedding = None if embedding_func is None else (embedding_func, embedding_tokenizer)
        self._classifier: Tensor | None = None  # (E + 1,) weights and bias
        super().__init__(
            **passed_on(locals(), "model_adapter_name", "ref_adapter_name", "embedding_func", "embedding_tokenizer")
        )
        self._mean, self._count = torch.zeros(2, dtype=self.metrics.dtype, device=self.args.device)

    # Data

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> `prompt_ids`, `completion_ids`, `label` and, with an embedding, the weight of each row."""
        dataset = prepare_judged(self, dataset, name)
        if self._embedding is None:
            return dataset
        if self._classifier is None:
            self._classifier = self._fit(dataset)
        if not isinstance(dataset, Dataset):
            weigh = lambda rows: {WEIGHT: self._weights(rows["prompt_ids"])}  # noqa: E731
            return dataset.map(weigh, batched=True, batch_size=EMBEDDED)
        prompts: Any = dataset.select_columns("prompt_ids").iter(EMBEDDED)
        total, quiet = -(-len(dataset) // EMBEDDED), self.args.disable_tqdm
        batches = tqdm(prompts, desc=f"Weighting the {name} dataset", total=total, disable=quiet)
        weights: Any = np.concatenate([self._weights(rows["prompt_ids"]) for rows in batches])
        return dataset.add_column(WEIGHT, weights)

    def _embed(self, prompts: Iterable[list[int]]) -> Tensor:
        """(B, E) fp64 on the host."""
        embed, tokenizer = cast(tuple[Any, Any], self._embedding)
        texts = self.loaded.tokenizer.batch_decode([list(ids) for ids in prompts])
        options: dict[str, Any] = {"padding": True, "truncation": True, "add_special_tokens": False}
        encoded = tokenizer(texts, return_tensors="pt", **options).to(self.args.device)
        with torch.no_grad():
            found = embed(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        return found.double().cpu()

    def _fit(self, dataset) -> Tensor:
        """The classifier of prompts, from `prompt_sample_size` rows of each label (of a stream: its first rows)."""
        size = self.args.prompt_sample_size
        if isinstance(dataset, Dataset):
            judged: Any = dataset.with_format("numpy")
            labels = np.asarray(judged["label"], bool)
            draw = np.random.default_rng(self.args.seed).permutation
            rows: Any = dataset.select(
                np.concatenate([draw(np.flatnonzero(labels == v))[:size] for v in (True, False)])
            )
        else:
            rows = list(dataset.take(2 * size))
        labels = torch.tensor([bool(row["label"]) for row in rows])
        if labels.all() or not labels.any():
            raise ValueError(
                "`embedding_func` needs desirable and undesirable rows to compare, but those sampled all have "
                f"label={bool(labels.any())}. Shuffle the dataset, or leave `embedding_func` out."
            )
        prompts = [row["prompt_ids"] for row in rows]
        parts = [self._embed(prompts[i : i + EMBEDDED]) for i in range(0, len(prompts), EMBEDDED)]
        features = torch.cat(parts)
        classifier = fit_logistic(features, labels)
        right = (probability(classifier, features) > 0.5) == labels
        logger.info(
            "A classifier tells the prompts of desirable answers in %.1f%% of %d cases, of others in %.1f%% of %d.",
            *(x for wanted in (labels, ~labels) for x in (100 * right[wanted].double().mean(), int(wanted.sum()))),
        )
        return classifier

    def _weights(self, prompts: Iterable[list[int]]) -> np.ndarray:
        assert self._classifier is not None
        found = density_ratio_weights(
            probability(self._classifier, self._embed(prompts)),
            min_density_ratio=self.args.min_density_ratio,
            max_density_ratio=self.args.max_density_ratio,
        )
        return found.float().numpy()

    def make_collator(self):
        """Batches of prompts and their answers."""
        return judged_collator(self)

    def adapt_collator(self, given):
        """A user's collator of judged answers."""
        return adapt_judged(self, given)

    # Loss

    def _shift(self, rewards: Tensor) -> Tensor:
        """delta: the mean of all rewards so far, over steps and ranks, those of this micro-batch included."""
        reduce = self._sum_over_ranks if self.world > 1 else None
        self._mean, self._count = running_mean(self._mean, self._count, rewards, reduce)
        return self._mean

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the batch's answers of their weighted losses, plus the router's."""
        assert self.reference is not None
        self.check_lengths(inputs)
        found = unpaired_loss(
            model,
            inputs,
            self.reference.logps(model, inputs),
            baseline=self._shift if self.metrics.training else self._mean,
            router=self.router_inputs(),
            loss_type="bco",
            beta=self.args.beta,
            undesirable_weights=inputs.extras.get(WEIGHT),
        )
        loss = self.with_router_loss(found.loss, found.aux_loss, None)
        self.metrics.mean("delta", found.result.baseline)
        record_unpaired(self, inputs, found.result)
        return with_outputs(model, inputs, loss, return_outputs)

    # Checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the loop itself, and the running mean."""
        return super().state_dict() | {"delta": (float(self._mean), float(self._count))}

    def load_state_dict(self, state: dict) -> None:
        """Continue the logging window and the running mean of a checkpoint."""
        super().load_state_dict(state)
        values = torch.tensor(state["delta"], dtype=self.metrics.dtype, device=self.args.device)
        self._mean, self._count = values


def fit_logistic(features: Tensor, labels: Tensor, strength: float = 1.0) -> Tensor:
    """Weights and bias (E + 1,) of a logistic regression of labels (n,) bool on features (n, E), fp64.

    It minimises strength |w|^2 / 2 plus the sum of losses, in which both labels weigh the same.
    """
    features, target = features.detach(), labels.to(features.dtype)
    share = torch.where(labels, labels.double().mean(), (~labels).double().mean())
    theta = torch.zeros(features.shape[1] + 1, dtype=features.dtype, requires_grad=True)
    options = {"max_iter": 500, "tolerance_grad": 1e-9, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([theta], line_search_fn="strong_wolfe", **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = features @ theta[:-1] + theta[-1]
        losses = F.binary_cross_entropy_with_logits(logits, target, 0.5 / share, reduction="sum")
        total = losses + 0.5 * strength * theta[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return theta.detach()


def probability(classifier: Tensor, features: Tensor) -> Tensor:
    """(B,) that `fit_logistic`'s classifier gives the label True."""
    return torch.sigmoid(features @ classifier[:-1] + classifier[-1])
