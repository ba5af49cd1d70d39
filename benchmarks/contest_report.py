"""What the speed contest shows: a table, a chart and a JSON file."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

OURS, THEIRS = "#1b6ca8", "#a9b4bd"
HEADER = (
    "contender",
    "tokens/s (range)",
    "loralab is faster by (range)",
    "train, s",
    "first step after, s",
    "peak RSS, GiB",
    "without mapped files, GiB",
    "first loss (difference)",
    "mean loss (difference)",
    "supervised tokens",
    "laid out",
    "share of matrix rate",
)


def render_table(result: dict[str, Any]) -> str:
    """Return the workload as Markdown: a line of facts, a table, those that cannot run, and notes."""
    rate = result["matrix_gflops"]
    lines = [
        f"## {result['title']}",
        "",
        f"{result['rows']} rows, {result['steps']} steps of {result['batch']}, {result['tokens']:,} tokens, "
        f"{result['supervised_tokens']:,} of them supervised, longest row {result['longest_row']}; matrix rate "
        f"{rate['square']:.0f} GFLOP/s (square), {rate['model']:.0f} (the model's own shapes).",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    lines += [f"| {' | '.join(_cells(name, figures))} |" for name, figures in result["contenders"].items()]
    lines.append("")
    lines += [f"- {name} does not run: {reason}" for name, reason in result["cannot_run"].items()]
    lines += [
        f"- gradients, {line['way']}, {line['when']}: {line['relative_difference']:.4f} from float32 on dequantized "
        f"weights, {line['without_gradient']} of {line['tensors']} tensors without one"
        + (f" ({line['error']})" if line["error"] else "")
        for line in result["gradients"]
        if "way" in line
    ]
    for name, figures in result["contenders"].items():
        found = figures["supervised_tokens"]
        if found is not None and found != result["supervised_tokens"]:
            lines.append(f"- {name} supervised {found - result['supervised_tokens']:+,} tokens against the rows' own")
        lines += [f"- {name}: {note}" for note in figures["notes"]]
    return "\n".join(lines)


def _cells(name: str, figures: dict[str, Any]) -> list[str]:
    ratio, share = figures.get("loralab_is_faster_by"), figures.get("share_of_matrix_rate")
    low, high = figures["range"]
    return [
        name,
        f"{figures['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})" if ratio and name != "loralab" else "",
        f"{figures['train_seconds']:.1f}",
        f"{figures['start_seconds']:.1f}",
        f"{figures['peak_rss_bytes'] / 2**30:.2f}",
        f"{figures['peak_anonymous_bytes'] / 2**30:.2f}",
        _loss(figures, "first_loss"),
        _loss(figures, "mean_loss"),
        "" if figures["supervised_tokens"] is None else f"{figures['supervised_tokens']:,}",
        f"{figures['layout_tokens']:,}" if figures["layout_tokens"] else "",
        f"{share:.2f}" if share else "",
    ]


def _loss(figures: dict[str, Any], name: str) -> str:
    difference = figures.get(f"{name}_difference")
    return f"{figures[name]:.4f}" + (f" ({difference:.1e})" if difference else "")


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Write tokens per second as horizontal bars, the fastest above."""
    mpl.use("Agg")
    ordered = sorted(result["contenders"].items(), key=lambda item: item[1]["tokens_per_second"])
    names = [name for name, _ in ordered]
    speeds = [figures["tokens_per_second"] for _, figures in ordered]
    below = [speed - figures["range"][0] for speed, (_, figures) in zip(speeds, ordered, strict=True)]
    above = [figures["range"][1] - speed for speed, (_, figures) in zip(speeds, ordered, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.45 * len(names)), layout="constrained")
    colours = [OURS if name.startswith("loralab") else THEIRS for name in names]
    axes.barh(names, speeds, color=colours, xerr=[below, above], error_kw={"elinewidth": 1, "capsize": 2})
    for place, speed in enumerate(speeds):
        axes.text(speed + above[place], place, f"  {speed:,.0f}", va="center", fontsize=9)
    axes.set_xlim(0, max(speed + more for speed, more in zip(speeds, above, strict=True)) * 1.15)
    axes.set_xlabel("tokens of prompt and answer per second, training loop alone")
    axes.set_title(result["title"], loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"processor": processor, "platform": platform.platform(), "python": platform.python_version()}


def write_report(results: Sequence[dict[str, Any]], settings: dict[str, Any], *, folder: Path) -> None:
    """Write `results.json`, `table.md` and one chart for each workload with figures."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "settings": settings, "workloads": list(results)}
    (folder / "results.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / "table.md").write_text("\n\n".join(render_table(each) for each in results) + "\n", encoding="utf-8")
    for result in results:
        if result["contenders"]:
            draw_chart(result, folder / f"{result['workload']}.png")
