"""Tables out of result files: ``python -m bench.report`` rewrites docs/performance.md from bench/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


def line(row: Row) -> str:
    """One row for the terminal, while the measurement runs."""
    what = f"{row['kind']:9}{row['case']:24}{row['dtype']:9}{row['pass']:19}{row['who']:20}"
    if row["kind"] == "memory":
        return f"{what}{row['extra_bytes'] / 2**20:10.1f} MiB"
    rate = f"{row['gflops_per_second']:10.1f} GFLOP/s" if "gflops_per_second" in row else ""
    return f"{what}{row['milliseconds']['median']:10.3f} ms{rate}"


def tables(result: dict[str, Any]) -> str:
    """All tables of a result file, as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    head = (
        f"{result['device']}, {result['threads']} threads, CPU kernels for {result['cpu_instruction_set']}; "
        f"{versions}; {result['date']}, commit {result['commit'][:12]}{dirty}\n\n    {result['command']}\n"
    )
    parts = [head]
    for kind, title in (("operator", "The operator"), ("layer", "The layer"), ("overhead", "One call of eight tokens")):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        if rows:
            parts.append(f"### {title}\n\n{_timing_table(rows)}")
    rows = [row for row in result["rows"] if row["kind"] == "memory"]
    if rows:
        parts.append(f"### Memory beyond inputs, outputs and gradients\n\n{_memory_table(rows)}")
    return "\n".join(parts)


def _groups(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    return groups


def _timing_table(rows: list[Row]) -> str:
    lines = [
        "| case | dtype | pass | who | ms, median (quartiles) | GFLOP/s | time / ours | relative error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (case, dtype, passed), group in _groups(rows).items():
        ours = next(row["milliseconds"]["median"] for row in group if row["who"] == "ours")
        for row in group:
            time = row["milliseconds"]
            # A matrix product does other work; its rate stands beside, its time does not compare.
            ratio = "" if row["who"] == "matmul" else f"{time['median'] / ours:.2f}"
            rate = f"{row['gflops_per_second']:.0f}" if "gflops_per_second" in row else ""
            error = f"{row['error']:.1e}" if row.get("error") is not None else ""
            spread = f"{time['median']:.3g} ({time['lower']:.3g} – {time['upper']:.3g})"
            lines.append(f"| {case} | {dtype} | {passed} | {row['who']} | {spread} | {rate} | {ratio} | {error} |")
    return "\n".join(lines) + "\n"


def _memory_table(rows: list[Row]) -> str:
    lines = ["| case | dtype | MiB |", "|---|---|---|"]
    lines += [f"| {row['case']} | {row['dtype']} | {row['extra_bytes'] / 2**20:.1f} |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws how many times faster ours is than each peer. Needs matplotlib."""
    import matplotlib.pyplot as plt

    labels, ratios = [], []
    for (case, dtype, passed), group in _groups([r for r in result["rows"] if "milliseconds" in r]).items():
        ours = next(row["milliseconds"]["median"] for row in group if row["who"] == "ours")
        for row in group:
            if row["who"] not in ("ours", "matmul"):
                labels.append(f"{row['kind']} {case} {dtype} {passed} vs {row['who']}")
                ratios.append(row["milliseconds"]["median"] / ours)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(labels)), layout="constrained")
    axes.barh(labels, ratios, color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than the peer, {result['device']}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parts = [
        "# Performance\n",
        "Made by `python -m bench.report` from the files in bench/results; every table is one run, in which ours and",
        "the peers took turns. Rates count attended pairs only: 4·B·H·D per pair forward, 2.5 times that backward.\n",
    ]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        parts.append(f"## {path.stem}\n\n{tables(json.loads(path.read_text()))}")
    (ROOT / "docs" / "performance.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
