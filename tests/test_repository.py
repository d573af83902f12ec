"""What GitHub reads: the workflow that runs .ci/run, and how to cite."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CITATION = ROOT / "CITATION.cff"
AUTHORS = (
    *("K L Navaneet", "Soroush Abbasi Koohpayegani", "Ajinkya Tejankar", "Kossar Pourahmadi"),
    *("Akshayvarun Subramanya", "Hamed Pirsiavash"),
)
TITLE = "Constrained Mean Shift Using Distant Yet Related Neighbors for Representation Learning"


def test_the_workflow_runs_what_ci_runs():
    assert re.search(r"^ +- run: bash \.ci/run$", WORKFLOW.read_text(), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("own_folder", [False, True])
def test_ci_runs_in_an_environment_inside_the_checkout(tmp_path, own_folder):
    """With a stand-in for Python that notes who is called; of two runs one installs."""
    checkout, calls, programs = tmp_path / "checkout", tmp_path / "calls", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    programs.mkdir()
    for name in (".ci/run", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, checkout / name)
    if own_folder:
        (checkout / ".venv").mkdir()
    python = programs / "python3"
    python.write_text(
        f'#!/bin/bash\necho "$0 $*" >> {calls}\n'
        f'if [ "$2" = venv ]; then\n  mkdir -p "$3/bin"\n'
        f'  for name in python pip ruff; do cp {python} "$3/bin/$name"; done\nfi\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CMSF_CI_CACHE": f"{tmp_path}/kept"}
    for _ in range(2):
        subprocess.run([checkout / ".ci" / "run"], env=os.environ | environment, check=True)
    called = calls.read_text().splitlines()
    assert len([line for line in called if "pip install" in line]) == 1
    (python,) = {line.split(" -m ")[0] for line in called if " -m pytest " in line}
    assert (python == f"{checkout}/.venv/bin/python") != own_folder
    assert (checkout / ".venv").is_dir() == own_folder and not (checkout / ".venv").is_symlink()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
@pytest.mark.parametrize("is_link", [False, True])
def test_an_environment_in_the_checkout_is_not_seen_by_git(tmp_path, is_link):
    (tmp_path / "environment" / "bin").mkdir(parents=True)
    (tmp_path / "environment" / "bin" / "python").touch()
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", checkout], check=True)
    shutil.copy(ROOT / ".gitignore", checkout)
    if is_link:
        (checkout / ".venv").symlink_to(tmp_path / "environment")
    else:
        shutil.copytree(tmp_path / "environment", checkout / ".venv")
    status = ["git", "-C", checkout, "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.check_output(status, text=True) == "?? .gitignore\n"


def test_the_citation_names_paper_authors_and_license():
    text = " ".join(CITATION.read_text().split())
    for words in (TITLE, "arXiv:2112.04607", "license: MIT", "title: CMSF", "year: 2022"):
        assert words in text
    people = re.findall(r"family-names: (.+?) given-names: (.+?) (?:- |conference:)", text)
    assert tuple(f"{given} {family}" for family, given in people) == AUTHORS


def test_the_workflow_is_yaml():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow[True] == ["push", "pull_request"]  # "on" is a truth value in YAML 1.1
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu")
    python, *_ = (step for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert python["with"]["python-version"] == "3.11"
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_the_citation_is_yaml_with_the_fields_that_its_format_asks_for():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load(CITATION.read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["title"], citation["license"]) == ("CMSF", "MIT")
    paper = citation["preferred-citation"]
    assert (paper["type"], paper["title"], paper["year"]) == ("conference-paper", TITLE, 2022)
    people = paper["authors"]
    assert tuple(f"{one['given-names']} {one['family-names']}" for one in people) == AUTHORS
    assert "ECCV" in paper["conference"]["name"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2112.04607"}]
