"""BCOTrainer against the same training written out on full logits, and the weights of prompts against closed forms."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign.trainers.bco import fit_logistic, probability

BETA, LR = 0.3, 0.05


def rows(n: int = 12) -> list[dict]:
    """Token ids; undesirable answers more often follow prompts of large ids."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(n):
        label = i % 3 > 0
        first = 5 if label else 150
        prompt = torch.randint(first, first + 180, (3 + i % 4,), generator=generator).tolist()
        answer = torch.randint(5, 331, (1 + i % 5,), generator=generator).tolist()
        made.append({"prompt_ids": prompt, "completion_ids": answer, "label": label})
    return made


def embed(input_ids, attention_mask):
    """Mean id and its square, of the tokens that are real."""
    mean = (input_ids * attention_mask).sum(1) / attention_mask.sum(1) / 331
    return torch.stack([mean, mean**2], 1)


def make(folder, model=None, optimizer=True, **given):
    arguments = {name: given.pop(name) for name in list(given) if name not in fastalign.BCOConfig.__dataclass_fields__}
    model = model or tiny_model()
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "beta": BETA,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    } | given
    if optimizer:
        arguments["optimizers"] = (torch.optim.SGD(model.parameters(), LR), None)
    return fastalign.BCOTrainer(
        model,
        args=fastalign.BCOConfig(**settings),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **{"train_dataset": Dataset.from_list(rows()), "ref_model": tiny_model(seed=3)} | arguments,
    )


def logps(model, row) -> torch.Tensor:
    """Of the answer, from full logits."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logp[len(row["prompt_ids"]) - 1 :].sum()


def expected(weights=None) -> list[dict]:
    """The run of `make`, without any of our code."""
    model, reference = tiny_model(), tiny_model(seed=3)
    optimizer, data, seen, log = torch.optim.SGD(model.parameters(), LR), rows(), [], []
    for step in range(3):
        entry = {"loss": 0.0, "delta": 0.0}
        for start in (4 * step, 4 * step + 2):
            losses = []
            batch = data[start : start + 2]
            with torch.no_grad():
                known = [logps(reference, row) for row in batch]
            rewards = [BETA * (logps(model, row) - ref) for row, ref in zip(batch, known, strict=True)]
            seen += [float(reward.detach()) for reward in rewards]
            delta = sum(seen) / len(seen)
            for i, (row, reward) in enumerate(zip(batch, rewards, strict=True)):
                weight = 1.0 if row["label"] or weights is None else weights[start + i]
                losses.append(-weight * F.logsigmoid((reward - delta) * (1 if row["label"] else -1)))
            loss = sum(losses) / len(losses) / 2
            loss.backward()
            entry["loss"] += float(loss.detach())
            entry["delta"] += delta / 2
        entry["grad_norm"] = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        log.append(entry)
    return log


def assert_same(trainer, log: list[dict]) -> None:
    for entry, wanted in zip(trainer.state.log_history[: len(log)], log, strict=True):
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("layout", ["flat", "padded", "precomputed"])
def test_training_equals_full_logits(layout, tmp_path):
    trainer = make(tmp_path, precompute_ref_log_probs=layout == "precomputed")
    if layout == "padded":
        trainer.data_collator.flat = False
    trainer.train()
    assert_same(trainer, expected())
    first = trainer.state.log_history[0]  # both micro-batches have both labels
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"])


def test_prompts_are_weighted_by_how_much_they_look_like_desirable_ones(tmp_path):
    trainer = make(tmp_path, embedding_func=embed, embedding_tokenizer=tiny_tokenizer())
    data, tokenizer = rows(), tiny_tokenizer()
    texts = [tokenizer.decode(row["prompt_ids"]) for row in data]
    ids = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
    features = torch.cat([embed(x, torch.ones_like(x)) for x in ids]).double()
    labels = torch.tensor([row["label"] for row in data])
    chance = probability(fit_logistic(features, labels), features)
    weights = (chance / (1 - chance)).clamp(0.5, 10).tolist()
    assert trainer.train_dataset["undesirable_weight"] == pytest.approx(weights, rel=1e-5)
    assert max(w for w, label in zip(weights, labels, strict=True) if not label) < 1  # unlike desirable prompts
    trainer.train()
    assert_same(trainer, expected(weights))
    stream = make(
        tmp_path,
        train_dataset=Dataset.from_list(data).to_iterable_dataset(),
        embedding_func=embed,
        embedding_tokenizer=tokenizer,
    )
    stream.train()
    assert_same(stream, expected(weights))


def test_logistic_regression_is_the_minimum():
    torch.manual_seed(0)
    features, labels = torch.randn(40, 3, dtype=torch.float64), torch.rand(40) < 0.3
    theta = fit_logistic(features, labels).requires_grad_()
    share = torch.where(labels, labels.double().mean(), (~labels).double().mean())
    signs = torch.where(labels, 1.0, -1.0)
    losses = F.softplus(-signs * (features @ theta[:-1] + theta[-1])) * 0.5 / share
    (gradient,) = torch.autograd.grad(losses.sum() + 0.5 * theta[:-1].square().sum(), theta)
    assert gradient.abs().max() < 1e-6
    even = fit_logistic(torch.zeros(5, 1, dtype=torch.float64), torch.tensor([True, False, False, False, False]))
    found = probability(even, torch.zeros(1, 1, dtype=torch.float64)).item()
    assert found == pytest.approx(0.5)  # labels weigh the same


def test_the_running_mean_goes_on_from_a_checkpoint(tmp_path):
    whole = make(tmp_path / "whole", optimizer=False)
    whole.train()
    make(tmp_path / "parts", optimizer=False, save_strategy="steps", save_steps=1, max_steps=3).train()
    resumed = make(tmp_path / "parts", optimizer=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    keys = ("loss", "grad_norm", "delta")
    ours, theirs = ({k: t.state.log_history[2][k] for k in keys} for t in (resumed, whole))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_evaluation_reads_the_mean_and_leaves_it(tmp_path):
    trainer = make(tmp_path, eval_dataset=Dataset.from_list(rows(6)))
    trainer.train()
    before = float(trainer._mean)
    found = trainer.evaluate()
    assert float(trainer._mean) == before == pytest.approx(found["eval_delta"])


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="embedding_tokenizer"):
        make(tmp_path, embedding_func=embed)
    with pytest.raises(ValueError, match="min_density_ratio"):
        make(tmp_path, min_density_ratio=3.0, max_density_ratio=2.0)
    with pytest.raises(ValueError, match="label=True"):
        good = Dataset.from_list([row for row in rows() if row["label"]])
        make(tmp_path, train_dataset=good, embedding_func=embed, embedding_tokenizer=tiny_tokenizer())
