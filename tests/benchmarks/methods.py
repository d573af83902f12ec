"""Every method on the demo data or on small real images, several seeds each: what it learns.

    python tests/benchmarks/methods.py [--seeds 0,1,2] [--only msf,2q] [--jobs 2] [--epochs 60]
    python tests/benchmarks/methods.py --data <FOLDER> --test <FOLDER> --epochs 12 --jobs 2

Each run is the method's own script, with `--demo` or with SMALL_IMAGES on the images of --data,
which measures 20-NN on val; then eval_knn.py and eval_linear.py (all train labels, cached
features), of real images on the val images of --test: `held_out.py` makes both folders. What a
folder (`--out`) already holds is not run again. The table: 20-NN on the images held out, 20-NN and
linear accuracy, purity of the constrained and the plain neighbors and effective rank at the end of
training: mean and standard deviation over the seeds; all figures are in figures.json there, which
`purity.py` draws. Flags behind `--` go to every training script. `cost.py` measures what a step
costs.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.runtime import origin

ROOT = origin.ROOT
SELF, SUPERVISED = "self_supervised", "supervised"
TWO_Q, KM, MSF = (f"{SELF}/train_msf{kind}.py" for kind in ("_2q", "_km", ""))
SUP, XENT = (f"{SUPERVISED}/train_sup_{kind}.py" for kind in ("msf", "xent"))
CROPS = "2x32:0.2-1,4x16:0.05-0.2"
SEMI = "semi_supervised/train_pseudo_cmsf.py"
# name: (script, its flags)
DEMO_METHODS: dict[str, tuple[str, list[str]]] = {
    "byol": (MSF, ["--topk", "1"]),
    "msf": (MSF, []),
    "km": (KM, []),
    "2q": (TWO_Q, []),
    "2q symmetric": (TWO_Q, ["--symmetric"]),
    "2q multi-crop": (TWO_Q, ["--multi_crop", CROPS]),
    "semi": (SEMI, []),
    "sup": (SUP, []),
    "sup top-20": (SUP, ["--topk", "20", "--topk_plain", "0"]),
    "sup top-all": (SUP, ["--topk", "all", "--topk_plain", "0"]),
    "xent": (XENT, []),
    "sup noise 25%": (SUP, ["--label_noise", "0.25"]),
    "xent noise 25%": (XENT, ["--label_noise", "0.25"]),
    "sup noise 50%": (SUP, ["--label_noise", "0.5"]),
    "xent noise 50%": (XENT, ["--label_noise", "0.5"]),
}
# The recipe of docs/results.md for images of 32 pixels, and what only the mean-shift scripts take.
SMALL_IMAGES = shlex.split(
    "--arch conv4 --image_size 32 --blur 0 --cos --batch_size 64 --learning_rate 0.05 "
    "--precision bf16 --cache_images ram"
)
SMALL_MEAN_SHIFT = shlex.split(
    "--weak_strong --momentum 0.99 --mem_bank_size 4096 --proj_dim 128 --hidden_dim 512 --proj_bn"
)
SMALL_SEMI = shlex.split(
    "--label_fraction 0.1 --topk 10 --mlp_xent mlp --pseudo_lbl_epochs 10 --use_conf --cache_sup"
)
# All of the label among 4,096 rows of ten classes; the target alone without a label.
SEMI_FAR = shlex.split("--topk 400 --topk_plain 1 --conf_th 0.5")
FAR = ["--topk", "all", "--topk_plain", "1"]  # all of the class, and the target itself
SMALL_METHODS: dict[str, tuple[str, list[str]]] = {
    "byol": (MSF, ["--topk", "1"]),
    "msf": (MSF, ["--topk", "5"]),
    "2q": (TWO_Q, ["--topk", "5", "--topkp", "5"]),
    "2q + own": (TWO_Q, ["--topk", "5", "--topkp", "5", "--topk_plain", "1"]),
    "km": (KM, ["--topk", "5", "--num_clusters", "1000"]),
    "semi 10%": (SEMI, SMALL_SEMI),
    "semi 10% far": (SEMI, [*SMALL_SEMI, *SEMI_FAR]),
    "sup top-10": (SUP, ["--topk", "10"]),
    "sup all + own": (SUP, FAR),
    "xent": (XENT, []),
}
NOISES = (0.2, 0.4, 0.6, 0.9)  # of ten classes, purities of about 64, 38, 20 and 10%
NOISY = {f"noise {100 * n:.0f}%": (SUP, [*FAR, "--label_noise", str(n)]) for n in NOISES}
REAL = SMALL_METHODS | NOISY
FIGURES = ("purity_constrained", "purity_plain", "effective_rank")  # of the log's last line
TITLES = {
    "20-NN held out": "held out",
    "20-NN": "20-NN",
    "linear": "linear",
    "purity_constrained": "pur. constr.",
    "purity_plain": "pur. plain",
    "effective_rank": "eff. rank",
    "minutes": "minutes",
}


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
    script, flags = args.methods[name]
    checkpoint = folder / f"ckpt_epoch_{args.epochs}.pth"
    common = ("--seed", seed, "--num_workers", 0)
    if not checkpoint.exists():
        length = ("--epochs", args.epochs, "--save_freq", args.epochs, "--knn_freq", 0)
        where = ("--checkpoint_path", folder, "--resume", "auto")
        run(script, *common, *length, *where, *setting(script, args), *flags, *args.training_flags)
    weights = ("--weights", checkpoint, "--save", folder, "--keep_done")
    images = (args.test,) if args.data else ("--demo",)
    run("eval/eval_knn.py", *common, *weights, *images)
    run("eval/eval_linear.py", *common, *weights, "--cached", "--lr", "0.3", *images)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    figures = {key: last[key] for key in FIGURES if last.get(key) is not None}
    if last.get("purity_true") is not None:  # of noisy labels, what is true of the neighbors
        figures["purity_constrained"] = last["purity_true"]
    held_out = [record["knn"]["20"]["accuracy"] for record in records if "knn" in record]
    figures["20-NN held out"] = held_out[-1]
    figures["20-NN"] = json.loads((folder / "knn.json").read_text())["k"]["20"]["accuracy"]
    figures["linear"] = json.loads((folder / "linear.json").read_text())["top1"]
    figures["minutes"] = last["seconds"] / 60
    print(f"{name}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def setting(script: str, args: argparse.Namespace) -> list[object]:
    """The images, and the flags that all runs of a script on them share."""
    if not args.data:
        return ["--demo"]
    return [args.data, *SMALL_IMAGES, *(SMALL_MEAN_SHIFT if script != XENT else [])]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation of each method's figures."""
    lines = [f"{'':16}" + "".join(f"{title:>15}" for title in TITLES.values())]
    for name, runs in results.items():
        cells = []
        for column in TITLES:
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
    parser.add_argument("--data", type=Path, help="train/, and val/ to choose settings by")
    parser.add_argument("--test", type=Path, help="the same train/, and the test set as val/")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "methods")
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default="0,1,2"
    )
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args(argv)
    args.training_flags = training_flags
    args.methods = REAL if args.data else DEMO_METHODS
    if (args.data is None) != (args.test is None):
        parser.error("--data and --test: both or none")
    if unknown := set(args.only or []) - set(args.methods):
        parser.error(f"--only {', '.join(unknown)}: one of {', '.join(args.methods)}")
    results = run_all(args.only or list(args.methods), args)
    about = {"epochs": args.epochs, "seeds": args.seeds, "data": str(args.data or "demo data")}
    (args.out / "figures.json").write_text(json.dumps(about | {"methods": results}, indent=1))
    where = f"{args.data}, {args.test}" if args.data else "demo data"
    print(f"{where}, {args.epochs} epochs, seeds {args.seeds}, mean ± standard deviation")
    print(table(results))


def run_all(names: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of each method, seed by seed: what is broken off compares all methods."""
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            (name, seed): pool.submit(study, name, seed, args)
            for seed in args.seeds
            for name in names
        }
        return {name: [jobs[name, seed].result() for seed in args.seeds] for name in names}


if __name__ == "__main__":
    main()
