"""Tokens per second of loralab and its peers on exactly the same rows, each in a process of its own.

Every repeat runs one whole epoch of each contender in turn; medians are reported, with the machine's matrix rate
measured in between, as a table, a JSON file and a bar chart for each workload. Without --data it takes the demo's
embedded model and rows. Run it on an idle machine:

    python benchmarks/throughput.py [--data FOLDER] [--workloads a b c4 c9 d d_short e] [--contenders NAME ...]
        [--repeats 5] [--rows N] [--base-dropout off|as_configured] [--threads N] [--environments FOLDER]
        [--work FOLDER] [--out FOLDER]

FOLDER of --data holds `sft/alpaca_en_demo`, `yesno/boolq`, `yesno/pubmedqa`, `tokenizers/gpt2` and
`tokenizers/qwen2.5`; that of --environments what `peers/environments.py` made. `peers/README.md` says who is who.
"""

import argparse
import os
import tempfile
from pathlib import Path

from contest import CONTENDERS, Settings, hold
from contest_report import render_table, write_report
from workloads import WORKLOADS


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, help="instead of each workload's own number")
    parser.add_argument("--base-dropout", choices=("off", "as_configured"), default="off")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--environments", type=Path, help="folder of the peers' own Python environments")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds of one run")
    parser.add_argument("--work", type=Path, help="folder of models, rows and runs, kept; by default a temporary one")
    parser.add_argument("--out", type=Path, help="where table, JSON and charts go; by default below the current folder")
    return parser.parse_args()


def main() -> None:
    """Hold the contest and write its report."""
    arguments = read_arguments()
    chosen = arguments.workloads or (["demo"] if arguments.data is None else [w for w in WORKLOADS if w != "demo"])
    out = arguments.out or Path("runs") / "bench"
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(
            data=arguments.data and arguments.data.absolute(),
            work=(arguments.work or Path(temporary)).absolute(),
            environments=arguments.environments and arguments.environments.absolute(),
            threads=arguments.threads,
            repeats=arguments.repeats,
            rows=arguments.rows,
            base_dropout=arguments.base_dropout,
            time_limit=arguments.time_limit,
        )
        shown = {"threads": settings.threads, "repeats": settings.repeats, "base_dropout": settings.base_dropout}
        results = []
        for name in chosen:
            workload = WORKLOADS[name]
            results.append(hold(name, workload, names=arguments.contenders or workload.contenders, settings=settings))
            print(f"\n{render_table(results[-1])}\n", flush=True)
            write_report(results, shown, folder=out)
    print(f"written: {out}/results.json, table.md and charts")


if __name__ == "__main__":
    main()
