"""What GitHub reads: the workflow that runs .ci/run, and how to cite."""

import os
import re

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
