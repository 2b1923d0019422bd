"""PPO's critic: a number for each state of an episode, from a model of its own that is trained beside the policy."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from fastalign_kernels.losses.value import clipped_value_loss
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from .data.batch import TokenBatch
from .loop.model_setup import place_model
from .loop.weights import like
from .models import load_model
from .pairs import disable_dropout
from .policy import head_loss, unwrap
from .reward_head import prepare_reward_model, score_loss, scores
from .scoring_head import attach_classifier


class ActorCritic(nn.Module):
    """What is wrapped, sharded and optimised: the policy, whose forward this is, and the critic beside it.

    The critic runs inside the policy's forward, from the op that makes the loss, so that wrappers see one forward.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module):
        super().__init__()
        self.module = policy  # `policy.unwrap` follows this name
        self.value_model = critic

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class ValueModelCallback(TrainerCallback):
    """Keeps the critic's weights in checkpoints."""

    def __init__(self, critic: nn.Module):
        self.critic = critic

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.critic.state_dict())

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        own = self.critic.state_dict()
        self.critic.load_state_dict({name: like(value, own[name]) for name, value in state.items()})


class ValueHead(nn.Linear):
    """A critic without a body: it reads the hidden states that the policy's head reads; 0 at first."""

    def __init__(self, policy: Any):
        super().__init__(policy.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N,) values, in the weight's precision, of hidden states (N, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))[:, 0]


def make_value_model(value_model: Any, reward_model: Any, policy: nn.Module, args) -> nn.Module:
    """The critic of `policy`: `value_model` (a model or a name), else a copy of the reward model, else of the policy.

    With `args.share_backbone` a `ValueHead`. Made from the policy its head is 0, and so are its first values.
    ValueError for a model that does not give one number per token, or that is trained or frozen in another place.
    """
    base = unwrap(policy)
    if args.share_backbone:
        if value_model is not None:
            raise ValueError(
                "`share_backbone=True` makes a head on the policy, but a `value_model` is given: drop one."
            )
        return ValueHead(base).to(next(base.parameters()).device)
    if value_model is None:
        value_model = copy.deepcopy(reward_model) if isinstance(reward_model, nn.Module) else reward_model
    if value_model is None:
        value_model = _from_policy(base)
    if isinstance(value_model, str):
        kind = AutoModelForSequenceClassification
        value_model = load_model(
            value_model, trust_remote_code=args.trust_remote_code, kind=kind, num_labels=1, dtype=base.dtype
        )
    if value_model is reward_model or unwrap(value_model) is base:
        raise ValueError(
            "`value_model` is the same object as `model` or `reward_model`. Leave it out: it is then a copy of the "
            "reward model."
        )
    found = getattr(value_model.config, "num_labels", None)
    if not attach_classifier(unwrap(value_model)) or found != 1:
        raise ValueError(
            f"`value_model` ({type(value_model).__name__}, num_labels={found}) must give one number per token: load "
            "it with `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`."
        )
    return value_model


def ready_value_model(critic: Any, trainer) -> None:
    """Place `critic` and let it take the batches of the trainer's policy; dropout off, checkpointing as configured."""
    args = trainer.args
    if isinstance(critic, ValueHead):
        return
    critic.config.use_cache = False
    place_model(critic, args, trainer.accelerator)
    disable_dropout(critic)
    info = prepare_reward_model(critic, allow_flat=trainer.policy.flat)
    if (trainer.policy.flat, trainer.policy.shares_prefix) > (info.flat, info.shares_prefix):
        raise ValueError(
            f"`value_model` ({type(critic).__name__}) cannot take the batches that the policy takes: {info.reason}. "
            "Use a model of the policy's kind."
        )
    if args.gradient_checkpointing:
        critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)


def state_values(critic: nn.Module, batch: TokenBatch, policy: nn.Module) -> Tensor:
    """(N,) values, fp32, at `batch.source`, in padded batches too.

    One forward of `critic`, or of the `policy` that it is a head on.
    """
    if isinstance(critic, ValueHead):

        def op(hidden: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
            return hidden.sum(), critic(hidden)

        return head_loss(policy, batch, op).result
    return scores(critic, batch, per_token=True)[:, 0]


def critic_loss(
    critic: nn.Module, batch: TokenBatch, hidden: Tensor, weights: Tensor, cliprange_value: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The clipped loss of the values at `batch.source`, summed with `weights` (N,); (loss, clipped) of each.

    `hidden` (N, D) are the policy's hidden states there, for a critic that is a head on them.
    `batch.extras` has the values that sampled the batch, "value", and what they should have been, "return", (N,) each.
    """

    def op(values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        old, returns = batch.extras["value"], batch.extras["return"]
        losses, clipped = clipped_value_loss(values, old, returns, cliprange_value=cliprange_value)
        return (losses * weights).sum(), (losses.detach(), clipped)

    if isinstance(critic, ValueHead):
        return op(critic(hidden))
    found = score_loss(critic, batch, lambda column: op(column[:, 0]), per_token=True)
    return found.loss, found.result


def _from_policy(base: Any) -> nn.Module:
    """A classification model around a copy of the policy's body, adapters left out, its head 0."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    made: Any = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    body = {
        name.replace(".base_layer", ""): value
        for name, value in base.base_model.state_dict().items()
        if "lora_" not in name
    }
    made.base_model.load_state_dict(body)
    (head,) = [module for module in made.modules() if id(module) in attach_classifier(made)]
    nn.init.zeros_(cast(Tensor, head.weight))
    return made.to(next(base.parameters()).device)
