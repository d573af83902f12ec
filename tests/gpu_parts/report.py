"""The report of `tests/gpu.py`: report.json with everything, report.md to read, the last table."""

import json
import shlex
from pathlib import Path
from typing import Any

from gpu_parts.part import RECORD
from utils.runtime import plain_json
from utils.runtime.errors import printable

OUTPUT = "output.txt"
_SHOWN_LINES = 40  # of the output of a part that went wrong
_BAD = ("failed", "hung", "died", "cut off")


def result(folder: Path, how: str, *, seconds: float, budget: float) -> dict[str, Any]:
    """What a part that ran in `folder` found, and its verdict.

    how: "ended", "hung" (its time was over), "exit code N", "signal N", "left out", "running", or
    "cut off" (the whole call was).
    """
    record_file, output_file = folder / RECORD, folder / OUTPUT
    found = {"figures": [], "checks": [], "left_out": [], "series": {}, "memory": {}, "machine": {}}
    if record_file.exists():
        found = json.loads(record_file.read_text())
    output = output_file.read_text(errors="replace") if output_file.exists() else ""
    verdict = _verdict(found, how)
    return {
        "verdict": verdict,
        "how": how,
        "seconds": round(seconds, 1),
        "budget": round(budget, 1),
        **found,
        "output": output.splitlines()[-400:],
    }


def _verdict(found: dict, how: str) -> str:
    if how in ("left out", "running", "cut off", "hung"):
        return how
    if how.startswith("signal"):
        return "died"
    if how != "ended" or not all(check["holds"] for check in found["checks"]):
        return "failed"
    if not (found["checks"] or found["figures"]):
        return "left out" if found["left_out"] else "failed"  # one that found nothing did nothing
    return "passed" if all(f.get("reached", True) for f in found["figures"]) else "missed"


def write(out: Path, results: dict[str, dict], *, command: list[str], whole: float) -> None:
    """Write both files anew; a reader never sees half of one."""
    about = {"command": command, "seconds": round(whole, 1), "machine": _machine(results)}
    _replace(out / "report.json", plain_json.dumps(about | {"parts": results}, indent=1))
    _replace(out / "report.md", markdown(about, results))


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


def _machine(results: dict[str, dict]) -> dict[str, Any]:
    return next((r["machine"] for r in results.values() if r["machine"]), {})


def markdown(about: dict[str, Any], results: dict[str, dict]) -> str:
    """The report as text: machine, the table, then each part."""
    machine = dict(about["machine"])
    lines = [f"# {machine.pop('device', 'no part ran')}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [f"`{printable(shlex.join(about['command']))}`, {about['seconds']:.0f} s", ""]
    lines += ["| part | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {r['verdict']} | {r['seconds']:.0f} |" for name, r in results.items()]
    for name, found in results.items():
        lines += ["", f"## {name}: {found['verdict']}", ""]
        if found["figures"]:
            lines += ["| | | spread | goal |", "|---|---|---|---|"]
            lines += [_figure_row(figure) for figure in found["figures"]]
            lines += [""]
        for check in found["checks"]:
            said = f": {check['said']}" if check["said"] else ""
            lines += [f"* {'holds' if check['holds'] else 'DOES NOT HOLD'}: {check['name']}{said}"]
        lines += [f"* left out: {left['name']} ({left['why']})" for left in found["left_out"]]
        if found["verdict"] == "hung":
            lines += [f"* ended after its {found['budget']:.0f} s"]
        elif found["how"].startswith(("exit", "signal")):
            lines += [f"* ended with {found['how']}"]
        if found["how"] == "left out":
            lines += [f"* left out: {found['budget']:.0f} s of all the time were left"]
        if found["verdict"] in _BAD:
            lines += ["", "```text", *found["output"][-_SHOWN_LINES:], "```"]
    return "\n".join(lines) + "\n"


def _figure_row(figure: dict) -> str:
    spread = ""
    if "n" in figure:
        low, high = (shown(figure[end]) for end in ("lowest", "highest"))
        spread = f"{low} to {high}, n {figure['n']}"
    goal = figure.get("goal", "")
    if goal:
        goal += " (reached)" if figure["reached"] else " (MISSED)"
    value = f"{shown(figure['value'])} {figure['unit']}".strip()
    return f"| {figure['name']} | {value} | {spread} | {goal} |"


def shown(value: float | str) -> str:
    """A figure with five digits; text as it is."""
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 10**7):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def _in_short(figure: dict) -> str:
    text = f"{figure['name']} {shown(figure['value'])} {figure['unit']}".strip()
    return text if figure.get("reached", True) else f"{text} (MISSED: {figure['goal']})"


def table(results: dict[str, dict]) -> str:
    """Part, verdict, its figures in short, seconds: the last lines that are printed."""
    lines = [f"{'part':<12}{'verdict':<10}{'seconds':>8}  figures"]
    for name, found in results.items():
        words = [_in_short(figure) for figure in found["figures"]]
        words += [f"FAILED: {c['name']} ({c['said']})" for c in found["checks"] if not c["holds"]]
        held = sum(check["holds"] for check in found["checks"])
        words += [f"{held} of {len(found['checks'])} checks hold"] if found["checks"] else []
        words += [f"left out: {left['name']} ({left['why'][:80]})" for left in found["left_out"]]
        first, *others = words or [found["how"]]
        lines += [f"{name:<12}{found['verdict']:<10}{found['seconds']:>8.1f}  {first}"]
        lines += [f"{'':<32}{word}" for word in others]
    return "\n".join(lines)
