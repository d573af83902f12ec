"""Every method on the demo data, several seeds each: what it learns and what it costs.

    python tests/benchmarks/methods.py [--seeds 0,1,2] [--only msf,2q] [--jobs 2] [--epochs 60]
    python tests/benchmarks/methods.py --cost

Each run is the method's own script with `--demo`, then eval_knn.py and eval_linear.py (all train
labels, cached features). What a folder (`--out`) already holds is not run again. The table: 20-NN
and linear accuracy on val, purity of the constrained and the plain neighbors and effective rank at
the end of training: mean and standard deviation over the seeds. More than one job at a time makes
seconds of training mean little: `--cost` measures steps of all methods in turn, on views that are
ready, relative to MSF. Flags behind `--` go to every training script.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import options

ROOT = options.ROOT
SELF, SUPERVISED = "self_supervised", "supervised"
TWO_Q, KM, MSF = (f"{SELF}/train_msf{kind}.py" for kind in ("_2q", "_km", ""))
SUP, XENT = (f"{SUPERVISED}/train_sup_{kind}.py" for kind in ("msf", "xent"))
CROPS = "2x32:0.2-1,4x16:0.05-0.2"
# name: (script, its flags)
METHODS: dict[str, tuple[str, list[str]]] = {
    "byol": (MSF, ["--topk", "1"]),
    "msf": (MSF, []),
    "km": (KM, []),
    "2q": (TWO_Q, []),
    "2q symmetric": (TWO_Q, ["--symmetric"]),
    "2q multi-crop": (TWO_Q, ["--multi_crop", CROPS]),
    "semi": ("semi_supervised/train_pseudo_cmsf.py", []),
    "sup": (SUP, []),
    "sup top-all": (SUP, ["--topk", "all"]),
    "xent": (XENT, []),
    "sup noise 25%": (SUP, ["--label_noise", "0.25"]),
    "xent noise 25%": (XENT, ["--label_noise", "0.25"]),
    "sup noise 50%": (SUP, ["--label_noise", "0.5"]),
    "xent noise 50%": (XENT, ["--label_noise", "0.5"]),
}
COLUMNS = ("20-NN", "linear", "purity_constrained", "purity_plain", "effective_rank")


def run(*command: object) -> None:
    """Run a script of the repository on one thread; its output ends this one if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{command}: {done.stdout}{done.stderr}")


def study(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and evaluate once, as far as it is not there; the figures."""
    folder = args.out / name.replace(" ", "_").replace("%", "") / str(seed)
    script, flags = METHODS[name]
    checkpoint = folder / f"ckpt_epoch_{args.epochs}.pth"
    common = ("--demo", "--seed", seed, "--num_workers", 0)
    if not checkpoint.exists():
        length = ("--epochs", args.epochs, "--save_freq", args.epochs, "--knn_freq", -1)
        where = ("--checkpoint_path", folder)
        run(script, *common, *length, *where, *flags, *args.training_flags)
    weights = ("--weights", checkpoint, "--save", folder)
    if not (folder / "knn.json").exists():
        run("eval/eval_knn.py", *common, *weights)
    if not (folder / "linear.json").exists():
        run("eval/eval_linear.py", *common, *weights, "--cached", "--lr", "0.3")
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    figures = {key: last[key] for key in COLUMNS if last.get(key) is not None}
    figures["20-NN"] = json.loads((folder / "knn.json").read_text())["k"]["20"]["accuracy"]
    figures["linear"] = json.loads((folder / "linear.json").read_text())["top1"]
    print(f"{name}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation of each method's figures."""
    titles = ("20-NN", "linear", "pur. constr.", "pur. plain", "eff. rank")
    lines = [f"{'':16}" + "".join(f"{title:>15}" for title in titles)]
    for name, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = [figures[column] for figures in runs if column in figures]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}" if values else "-")
        lines.append(f"{name:16}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    argv, training_flags = sys.argv[1:], []
    if "--" in argv:
        argv, training_flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "methods")
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default="0,1,2"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args(argv)
    args.training_flags = training_flags
    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed, so that what is there when it is broken off compares all methods.
        jobs = {
            (name, seed): pool.submit(study, name, seed, args)
            for seed in args.seeds
            for name in args.only
        }
        results = {n: [jobs[n, seed].result() for seed in args.seeds] for n in args.only}
    print(f"demo data, {args.epochs} epochs, seeds {args.seeds}, mean ± standard deviation")
    print(table(results))


if __name__ == "__main__":
    main()
