"""The report shows the numbers of a run's files, for one run and for several, and refuses folders without a run."""

import json
import re
from html import unescape

import pandas
import pytest

from fastalign.cli.main import main
from fastalign.report import read_run, write_report
from fastalign.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, Line, labels, line_chart, short, ticks

LOG = [
    {
        "step": 10,
        "epoch": 0.5,
        "loss": 3.25,
        "grad_norm": 1.5,
        "learning_rate": 2e-4,
        "entropy": 2.5,
        "num_tokens": 1000,
    },
    {"step": 10, "epoch": 0.5, "eval_loss": 3.0, "eval_runtime": 0.5, "eval_num_tokens": 7},
    {
        "step": 20,
        "epoch": 1.0,
        "loss": 1.75,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "entropy": 1.5,
        "num_tokens": 2000,
    },
    {"step": 20, "epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 0.5, "eval_num_tokens": 7},
    {"step": 20, "epoch": 1.0, "train_runtime": 12.5, "train_loss": 2.5},
]


def make_run(folder, log=LOG, step=20):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "epoch": 1.0, "log_history": log, "best_metric": None}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def chart_data(page: str) -> list[list[dict]]:
    """The lines of each chart, as the page's script reads them."""
    return [json.loads(unescape(text)) for text in re.findall(r'data-lines="(.*?)"', page)]


def test_curves_hold_the_logged_numbers(tmp_path):
    page = write_report(make_run(tmp_path / "a")).read_text()
    charts = chart_data(page)
    loss = {line["label"]: [(x, y) for x, _, y in line["points"]] for line in charts[0]}
    assert loss == {"train": [(10, 3.25), (20, 1.75)], "eval": [(10, 3.0), (20, 1.5)]}
    assert [line["points"][1][2] for chart in charts[1:] for line in chart] == [1.5, 0.5, 1e-4]
    captions = [re.sub("<.*", "", text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert captions == ["loss", "entropy", "gradient norm", "learning rate"]
    assert "3.25 → 1.75" in page and "12.5" in page and "2,000" in page


def test_page_needs_nothing_from_outside(tmp_path):
    page = write_report(make_run(tmp_path / "a")).read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", page)


def test_points_are_where_the_axes_say():
    lines = json.loads(unescape(re.search(r'data-lines="(.*?)"', line_chart([Line("a", [(0, 1.0), (10, 3.0)])]))[1]))
    assert [point[1] for point in lines[0]["points"]] == [LEFT, WIDTH - RIGHT]
    svg = line_chart([Line("a", [(0, 0.0), (1, 10.0)])])
    grid = [float(y) for y in re.findall(r'class="grid".*?y1="([\d.]+)"', svg)]
    bottom, top = (float(y) for y in re.search(r'<path.*?M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', svg).groups())
    assert grid[0] == bottom and top in grid and 0 < top < bottom < HEIGHT


def test_ticks_and_numbers():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.48) == [0.2, 0.3, 0.4]
    assert ticks(3, 3) == [3]
    assert [short(x) for x in (0.000015, 0.25, 12, 12345, 3_200_000)] == ["1.5e-05", "0.25", "12", "12,345", "3.2M"]


def test_labels_tell_ticks_apart():
    assert labels([5.7961, 5.7962, 5.79625]) == ["5.7961", "5.7962", "5.79625"]
    assert labels([0, 0.5, 1]) == ["0", "0.5", "1"]
    assert labels([0.00012, 0.000121]) == ["1.20e-04", "1.21e-04"]


def test_last_checkpoint_stands_for_a_run_that_was_cut_off(tmp_path):
    make_run(tmp_path / "run" / "checkpoint-9", LOG[:1], 9)
    make_run(tmp_path / "run" / "checkpoint-10", LOG[:2], 10)
    run = read_run(tmp_path / "run")
    assert run.state["global_step"] == 10 and run.last("eval_loss") == 3.0


def test_samples_results_and_settings(tmp_path):
    folder = make_run(tmp_path / "a")
    lines = [
        {"stage": "before", "prompt": "2 < 1", "completion": "<b>?</b>", "expected": "no", "correct": False},
        {"stage": "after", "prompt": "2 < 1", "completion": "no", "expected": "no", "correct": True},
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "results.json").write_text(json.dumps({"columns": ["", "after"], "rows": [["accuracy", "91.0%"]]}))
    (folder / "run.yaml").write_text("learning_rate: 0.002\n")
    page = write_report(folder).read_text()
    row = re.search(r"<tr><td>2 &lt; 1</td>.*?</tr>", page)[0]
    assert '<td class="wrong">✗ &lt;b&gt;?&lt;/b&gt;</td><td class="right">✓ no</td>' in row
    assert "<td>accuracy</td><td>91.0%</td>" in page and "<td>learning_rate</td><td>0.002</td>" in page


ONLINE = [
    {"step": step, "loss": 0.1, "rewards/brief/mean": 1.0 * step, "grad_norm": 1.0, "rewards/brief/std": 0.5}
    | {"entropy": 0.3, "reward": 2.0 * step, "reward_std": 0.5}
    for step in (9, 10)
]


def test_the_reward_comes_first_in_runs_that_have_one(tmp_path):
    page = write_report(make_run(tmp_path / "a", ONLINE)).read_text()
    captions = [re.sub("<.*", "", text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert captions[:5] == ["reward", "rewards/brief/mean", "loss", "entropy", "gradient norm"]
    assert captions[5:] == ["rewards/brief/std", "reward std"]
    assert page.index("reward, first → last") < page.index("loss, first → last") and "18 → 20" in page


def test_completions_of_the_first_and_the_last_log(tmp_path):
    folder = make_run(tmp_path / "a", ONLINE)
    (folder / "completions").mkdir()
    for step in (99_999, 100_000, 5):  # in the order of their numbers, which is not that of the names
        told = [{"role": "assistant", "content": f"<answer> of {step}"}]
        rows = [{"step": step, "prompt": "q", "completion": told, "brief": 0.5, "advantage": -1.25}]
        rows.append(rows[0] | {"completion": [{"role": "assistant", "content": "other"}], "brief": float("nan")})
        pandas.DataFrame(rows).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    page = write_report(folder).read_text()
    part = page[page.index("<h2>Completions</h2>") : page.index("</section>", page.index("<h2>Completions</h2>"))]
    assert re.findall("<h4>(.*?)</h4>", part) == ["step 5", "step 100000"]
    assert re.findall("<th>(.*?)</th>", part)[:4] == ["prompt", "completion", "brief", "advantage"]
    rows = re.findall("<tr>(<td.*?)</tr>", part, re.DOTALL)
    cells = [re.findall("<td.*?>(.*?)</td>", row, re.DOTALL) for row in rows]
    assert cells[0] == ["q", "assistant: &lt;answer&gt; of 5", "0.5", "-1.25"]
    assert cells[1] == ["q", "assistant: other", "", "-1.25"] and cells[2][1].endswith("of 100000")


def test_several_runs_share_the_charts(tmp_path):
    other = [{**entry, "loss": entry["loss"] + 1} if "loss" in entry else entry for entry in LOG]
    folders = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run", other)]
    loss = chart_data(write_report(folders, tmp_path / "out.html").read_text())[0]
    assert [(line["label"], line["points"][0][2]) for line in loss] == [
        ("run (1) train", 3.25),
        ("run (1) eval", 3.0),
        ("run (2) train", 4.25),
        ("run (2) eval", 3.0),
    ]


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}]
    assert read_run(make_run(tmp_path / "a", log)).curves()["loss"] == [(1, 1.0), (3, 0.5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no run"), ("{'step'", "not valid JSON"), ("[]", "must hold a JSON object")],
)
def test_folder_without_a_readable_run_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_command_says_where_the_report_is(tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html"), "--title", "My run"]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'r.html'}\n"
    assert "<title>My run</title>" in (tmp_path / "r.html").read_text()
