"""The demo's task, model and evaluation, and a short run of the whole."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.cli.main import main
from fastalign.demo import run, stages
from fastalign.demo.evaluate import complete, score
from fastalign.demo.model import make_model, make_tokenizer
from fastalign.demo.task import Task, is_right, noisy_rows, preference_rows, sort_tasks


def test_tasks_are_sorted_and_held_out():
    held_out = sort_tasks(50, 2, seed=0)
    train = sort_tasks(500, 2, seed=1, without=frozenset(task.prompt for task in held_out))
    assert all(task.answer == "".join(sorted(task.prompt[:-1])) and task.prompt[-1] == "=" for task in train)
    assert not {task.prompt for task in train} & {task.prompt for task in held_out}
    assert sort_tasks(50, 2, seed=0) == held_out != sort_tasks(50, 2, seed=2)


def test_noise_spoils_its_share_of_the_answers():
    tasks = sort_tasks(2000, 6, seed=0)
    for noise, low, high in ((0.0, 0.0, 0.0), (0.5, 0.46, 0.54), (1.0, 0.99, 1.0)):
        rows = noisy_rows(tasks, noise, seed=1)
        wrong = sum(text != task.answer for text, task in zip(rows["completion"], tasks, strict=True)) / len(tasks)
        assert low <= wrong <= high and rows["prompt"] == [task.prompt for task in tasks]


def test_pairs_prefer_the_answer_to_something_else():
    tasks = sort_tasks(2000, 2, seed=0)
    rows = preference_rows(tasks, seed=1)
    answers = {task.prompt: task.answer for task in tasks}
    triples = list(zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True))
    assert all(chosen == answers[prompt] != rejected and len(rejected) == 2 for prompt, chosen, rejected in triples)
    assert 1950 <= len(triples) < 2000  # one in a hundred is right by chance


def test_tokenizer_gives_texts_back():
    tokenizer = make_tokenizer()
    ids = tokenizer("120=012")["input_ids"]
    assert len(ids) == 7 and tokenizer.decode(ids) == "120=012"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "120=012"


def test_batched_greedy_completion_is_that_of_one_prompt_at_a_time():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=3, hidden_size=64)
    prompts = ["1=", "582=", "99113=", "0="]
    alone = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] < start + 6 and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        alone.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=3) == alone
    state = torch.get_rng_state()
    assert score(model, tokenizer, [Task(prompt, "----") for prompt in prompts], seed=0).greedy == 0  # 4 + 2 tokens
    tasks = [Task(prompt, text.strip()) for prompt, text in zip(prompts, alone, strict=True)]
    assert all(map(is_right, tasks, alone)) and not is_right(tasks[0], alone[0][:-1])
    assert torch.equal(torch.get_rng_state(), state)


def test_short_demo_learns_and_leaves_models_that_load(tmp_path, monkeypatch, capsys):
    for name, value in {"NUM_DIGITS": 3, "NOISE": 0.3, "BATCH": 128, "PAIR_BATCH": 64, "PROMPTS": 32}.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(run, "NUM_HELD_OUT", 64)
    assert main(["demo", "--output_dir", str(tmp_path), "--steps", "72"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "grpo" / "results.json").read_text())
    rows = {row[0]: row[1:] for row in results["rows"]}
    before, tuned, preferring, after = (float(text.rstrip("%")) for text in rows["accuracy, greedy"])
    assert before <= 5 and tuned >= 60 and preferring >= tuned - 15 and after >= preferring - 5
    before, tuned, preferring, after = (float(text.rstrip("%")) for text in rows["accuracy, sampled"])
    assert before <= 5 and tuned <= 60 and preferring >= tuned + 5 and after >= preferring + 8
    losses = [float(text) for text in rows["held-out loss (nats/token)"]]
    assert losses[1] < 0.5 < 2 < losses[0] and losses[3] < losses[2] < losses[1]
    assert str(tmp_path / "report.html") in out and "accuracy, greedy" in out
    page = (tmp_path / "report.html").read_text()
    shown = ("sampled after GRPO", "rewards/margins", "rewards/right answer/mean", "<h2>Health</h2>", "data-lines")
    assert all(text in page for text in shown)
    samples = [json.loads(line) for line in (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert all(s["correct"] == (s["completion"] == s["expected"]) for s in samples)
    tasks = sort_tasks(64, 3, seed=0)
    for name in run.STAGES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        found = [s["completion"] for s in samples if s["stage"] == f"sampled after {name.upper()}"]
        assert len(found) == 24 and score(model, tokenizer, tasks, seed=0).completions[:24] == found
