"""scripts/diffusers_suites: what it replaces and says; with $DIFFUSERS_CHECKOUT, which tests pass."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, run_python
from tests.scripts.helpers import load_script

SCRIPT = ROOT / "scripts" / "diffusers_suites"
CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("diffusers_suites")


def test_names_and_attributes_of_the_module_are_replaced(script: Any) -> None:
    class Theirs: ...

    class Ours: ...

    class Other: ...

    module = types.ModuleType("tests_of_diffusers")

    class Base:  # of another module
        classes = (Theirs,)

    class Case(Base):
        classes = (Theirs, Other)
        pipeline_class = Theirs

    Case.__module__ = module.__name__
    vars(module).update(Theirs=Theirs, Case=Case, Base=Base)
    script.replace(module, Theirs, Ours)
    assert vars(module)["Theirs"] is Ours
    assert (Case.classes, Case.pipeline_class) == ((Ours, Other), Ours)
    assert Base.classes == (Theirs,)


def test_what_it_says(script: Any) -> None:
    theirs = {
        "A::test_a": ("passed", ""),
        "A::test_betas": ("passed", ""),
        "A::test_c": ("skipped", "no GPU"),
    }
    ours = {
        "A::test_a": ("failed", "KeyError: 'b'"),
        "A::test_betas": ("failed", "x"),
        "A::test_c": ("passed", ""),
    }
    lines = script.describe("ddim", theirs, ours).splitlines()
    assert lines[0] == "ddim: 0 of the 2 tests that pass with diffusers' classes pass with ours (3 tests)"
    assert lines[1] == "  A::test_a: KeyError: 'b'"
    assert "beta_end of 2" in lines[2]
    assert lines[3] == "  A::test_c passes with ours only; with diffusers': no GPU"


def test_it_says_how_to_get_a_checkout(
    script: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DIFFUSERS_CHECKOUT", raising=False)
    for arguments in ([], [str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["diffusers_suites", *arguments])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        assert stopped.value.code == 2
        assert "git clone" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["diffusers_suites", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "parameterized" in capsys.readouterr().out


@pytest.mark.skipif(not CHECKOUT, reason="set DIFFUSERS_CHECKOUT to a clone of diffusers")
def test_most_of_diffusers_tests_of_the_samplers_pass(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run_python(SCRIPT, CHECKOUT, "--suite", "ddim", "--suite", "dpm", "--json", report)
    results = json.loads(report.read_text(encoding="utf-8"))
    failing = {
        test.rpartition("::")[2]
        for suite in results.values()
        for test, (outcome, _) in suite["theirs"].items()
        if outcome == "passed" and suite["ours"][test][0] != "passed"
    }
    explained = {"test_betas", "test_trained_betas", "test_beta_sigmas", "test_variance_type"}
    assert failing <= explained
