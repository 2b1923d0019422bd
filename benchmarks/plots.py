"""Bars of measured times, one group per case, as a PNG."""

from __future__ import annotations

from pathlib import Path


def draw(rows: list[dict], path: Path) -> None:
    """Draw rows of measurements in `ms`: one panel per op and dtype, one group of bars per shape."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault((row["op"], row.get("mode", ""), row.get("dtype", "")), []).append(row)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 3 * len(panels)), squeeze=False)
    for axis, (title, members) in zip(axes[:, 0], panels.items(), strict=True):
        shapes = list(dict.fromkeys(row["shape"] for row in members))
        names = list(dict.fromkeys(row["provider"] for row in members))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            own = {row["shape"]: row for row in members if row["provider"] == name}
            places = [k + i * width for k, shape in enumerate(shapes) if shape in own]
            found = [own[shape] for shape in shapes if shape in own]
            medians = [row["median"] for row in found]
            spread = [
                [row["median"] - row["p20"] for row in found],
                [row["p80"] - row["median"] for row in found],
            ]
            axis.bar(places, medians, width, yerr=spread, label=name)
        axis.set_xticks([k + 0.4 - width / 2 for k in range(len(shapes))], shapes)
        axis.set_title(" ".join(filter(None, title)))
        axis.set_ylabel("ms (less is better)")
        axis.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
