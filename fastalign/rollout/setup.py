"""The parts that a trainer of sampled data is put together from, as its arguments ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models import position_limit
from .choose import make_engine
from .engine import Engine
from .episodes import Rollouts
from .function_rollouts import FunctionRollouts
from .group_batches import GroupCollator
from .image_inputs import prepare_for_images
from .rewards import RewardPool


@dataclass
class Sources:
    """Where completions come from, besides the engine."""

    tools: list[Callable] | None = None
    rollout_func: Callable[[list, Any], dict] | None = None
    environment_factory: Any = None

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) or self.environment_factory is not None


def make_own_engine(trainer: Any, sources: Sources) -> Engine | None:
    """What samples, as the config asks; None where a `rollout_func` needs no engine."""
    args = trainer.args
    prepare_for_images(trainer, sources.has_tools)
    if sources.rollout_func is not None and not args.use_vllm:
        return None
    given: dict[str, Any] = {"accelerator": trainer.accelerator, "sampling": trainer.sampling}
    return make_engine(args, trainer.model, trainer.processing_class, **given)


def make_collator(trainer: Any) -> GroupCollator:
    """Batches that share prompts where that saves work and no balancing loss of experts counts their tokens.

    ValueError where `share_prefix=True` and the model cannot.
    """
    args, policy, has_router = trainer.args, trainer.policy, bool(trainer.router_coefficient)
    if args.share_prefix and not policy.shares_prefix:
        raise ValueError(
            f"`share_prefix=True`, but this model's completions cannot share a prompt: {policy.reason}. Set it to "
            "False."
        )
    share = args.share_prefix if policy.shares_prefix else False
    return GroupCollator(
        pad_token_id=trainer.loaded.tokenizer.pad_token_id,
        flat=policy.flat,
        share=False if share is None and has_router else share,
        whole=has_router,
        longest=position_limit(trainer.model),
        pad_to_multiple_of=args.padding_multiple,
    )


def make_rollouts(trainer: Any, sources: Sources) -> Any:
    """What samples: `run(rows, num_generations, seed) -> Iterator[Group]`. ValueError for two kinds at once."""
    args, template = trainer.args, trainer.args.chat_template_kwargs
    if sources.rollout_func is not None:
        if sources.has_tools:
            raise ValueError("`rollout_func` makes whole rollouts: leave out `tools` and `environment_factory`.")
        if getattr(args, "max_staleness", 0):
            raise ValueError(
                f"`max_staleness` is {args.max_staleness}, but `rollout_func` may sample from the weights that are "
                "being trained: set it to 0."
            )
        return FunctionRollouts(
            sources.rollout_func, trainer, trainer.processing_class, trainer.end_ids, chat_template_kwargs=template
        )
    return Rollouts(
        trainer.engine,
        trainer.processing_class,
        trainer.sampling,
        tools=sources.tools,
        environment_factory=sources.environment_factory,
        chat_template_kwargs=template,
        max_tool_calling_iterations=getattr(args, "max_tool_calling_iterations", None),
        tool_timeout=getattr(args, "tool_timeout", None),
        max_model_length=args.vllm_max_model_length if args.use_vllm else None,
    )


def make_rewards(args: Any, reward_funcs: Any, processing_classes: Any) -> RewardPool:
    """What scores completions, as `args` say."""
    return RewardPool(
        reward_funcs,
        args.reward_weights,
        processing_classes,
        device=args.device,
        timeout=args.reward_timeout,
        on_error=args.reward_on_error,
        chat_template_kwargs=args.chat_template_kwargs,
        model_init_kwargs=args.model_init_kwargs,
    )


def add_own_rewards(pool: RewardPool, rollouts: Any) -> None:
    """The rewards that environments give themselves into `pool`. ValueError where it is empty then."""
    for function in getattr(rollouts, "reward_funcs", ()):
        pool.add(function.__name__, function)
    if not pool.functions:
        raise ValueError(
            "`reward_funcs` is empty: give a function, a reward model, or a list of them, or an environment with "
            "`get_reward`."
        )
