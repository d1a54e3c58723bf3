"""One op, one name, the same files; and no sentence that only one machine could have written."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

import hvprune
from hvprune import ops, reference
from hvprune._registry import OPS
from hvprune.testing import CASES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_its_files(op):
    files = [f"hvprune/ops/{op}.py", f"hvprune/reference/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    files += [f"triton_kernels/{op}.py", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu"]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert f"`{op}`" in (ROOT / "README.md").read_text()
    assert CASES[op]


def test_the_names_agree():
    assert set(OPS) == set(ops.__all__) == set(reference.__all__) == set(CASES)


@pytest.mark.parametrize("op", sorted(OPS))
def test_reference_has_the_signature_of_the_op(op):
    signature = inspect.signature(getattr(ops, op)).parameters
    expected = [(name, parameter.kind, parameter.default) for name, parameter in signature.items() if name != "backend"]
    actual = inspect.signature(getattr(reference, op)).parameters
    assert [(name, parameter.kind, parameter.default) for name, parameter in actual.items()] == expected
    assert signature["backend"].default == "auto" and signature["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("op", sorted(OPS))
def test_docstring_says_what_a_user_needs(op):
    text = inspect.getdoc(getattr(ops, op))
    delegates = ":func:" in text and op.endswith(("hivtp_select", "vispruner_select"))
    for heading in () if delegates else ("Args:", "Returns:", "Memory:", "Raises:"):
        assert heading in text
    assert delegates or op == "gather_tokens" or "arXiv" in text


def test_changelog_names_the_version_or_what_comes():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{hvprune.__version__}]" in text


def test_no_path_or_host_of_one_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    suspicious = re.compile(r"(?<![\w.-])/(?:home|root|work|tmp)/\w|file:///|index-url")
    found = []
    for name in files:
        path = ROOT / name
        if path.suffix in (".jpg", ".png") or not path.is_file() or path == Path(__file__):
            continue
        found += [f"{name}: {line.strip()}" for line in path.read_text().splitlines() if suspicious.search(line)]
    assert found == []
