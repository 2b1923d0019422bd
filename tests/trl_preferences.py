"""TRL's own loss code of preference trainers, called on log-probabilities or logits without a trainer or a model."""

from collections import defaultdict
from types import SimpleNamespace

import torch


def _trainer(**settings):
    """What the loss methods read of a trainer: one rank in evaluation, nothing to log to."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda v: v, gather_for_metrics=lambda v: v)
    shared = {
        "model": SimpleNamespace(training=False),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    return SimpleNamespace(**shared, **settings)


def _fused_model(per_token_logps, mask, log_sum_p2=None):
    """A model with TRL's fused head whose log-probabilities (R, L) of the shifted positions are known."""
    zeros = torch.zeros_like(mask[:, 1:], dtype=torch.float32)
    kept = mask[:, 1:].to(per_token_logps.dtype)
    found = SimpleNamespace(log_probs=per_token_logps * kept, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    found.log_sum_sq_probs = log_sum_p2
    return lambda **_: found


def _inputs(mask):
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def trl_dpo(per_token_logps, mask, ref_logps, log_sum_p2=None, **settings):
    """(loss, metrics) of DPOTrainer; per_token_logps (2B, L) chosen first, mask (2B, L + 1), ref_logps (2B,)."""
    from trl import DPOTrainer

    defaults = {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05, "ld_alpha": None}
    defaults |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False}
    settings = defaults | settings
    types = settings.pop("loss_type")
    weights = settings.pop("loss_weights", [1.0] * len(types))
    args = SimpleNamespace(discopop_tau=settings.pop("discopop_tau"))
    trainer = _trainer(loss_types=types, loss_weights=weights, args=args, **settings)
    chosen, rejected = ref_logps.chunk(2)
    inputs = {**_inputs(mask), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(trainer, _fused_model(per_token_logps, mask, log_sum_p2), inputs, False)
    return loss, {key: values[-1] for key, values in trainer._metrics["eval"].items()}


def trl_kto(per_token_logps, mask, ref_logps, labels, kl_logps, ref_kl_logps, **settings):
    """(loss, metrics) of KTOTrainer; per_token_logps (R, L), mask (R, L + 1), the others (R,)."""
    from trl import KTOTrainer

    defaults = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    settings = defaults | settings
    trainer = _trainer(calculate_KL=settings["loss_type"] == "kto", **settings)
    trainer._compute_kl_logps = lambda model, batch: kl_logps
    inputs = {**_inputs(mask), "label": labels, "ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
    loss = KTOTrainer._compute_loss(trainer, _fused_model(per_token_logps, mask), inputs, False)
    return loss, {key: values[-1] for key, values in trainer._metrics["eval"].items()}


def trl_cpo(chosen_logps, rejected_logps, **settings):
    """(losses, rewards of chosen, of rejected) of CPOTrainer."""
    from trl.experimental.cpo import CPOTrainer

    defaults = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0}
    return CPOTrainer.cpo_loss(_trainer(**(defaults | settings)), chosen_logps, rejected_logps)


def trl_orpo(chosen_logps, rejected_logps, beta):
    """(losses, rewards of chosen, of rejected, mean log sigma, mean log odds ratio) of ORPOTrainer."""
    from trl.experimental.orpo import ORPOTrainer

    losses, *rest = ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen_logps, rejected_logps)
    return -losses, *rest


def trl_tpo(logits, input_ids, mask, **settings):
    """Loss of TPOTrainer on logits (3B, L, V), input_ids and mask (3B, L): chosen, rejected, reference."""
    from trl.experimental.tpo import TPOTrainer

    defaults = {"loss_type": "sigmoid", "beta": 0.01, "label_smoothing": 0.0, "tpo_l_gamma": 0.5, "tpo_alpha": 1.0}
    inputs = {**_inputs(mask), "input_ids": input_ids}
    trainer = _trainer(**(defaults | settings))
    return TPOTrainer._compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs, False)


def trl_reward(rewards, margin=None, center_rewards_coefficient=None):
    """Loss of RewardTrainer on rewards (2B,), chosen first."""
    from trl import RewardTrainer

    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient))
    inputs = {} if margin is None else {"margin": margin}
    return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)
