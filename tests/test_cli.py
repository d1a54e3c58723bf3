"""The command line: every way to get it wrong is one line and status 2, and info says what is the case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvprune
from hvprune import _native, info
from hvprune._registry import BACKENDS, OPS
from hvprune.cli import main

PHOTO = Path(__file__).parents[1] / "examples" / "chelsea.jpg"


def values(report: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in report.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "0"], "grid must be of 1 to 4096 patches, got 0x0"),
        (["--grid", "65x64"], "grid must be of 1 to 4096 patches, got 65x64"),
        (["--grid", "a"], "argument --grid: must be rows or rows x columns such as 24 or 18x32, got 'a'"),
        (["--num-tokens", "577"], "num-tokens must be in [0, N] with N=576 patches, got 577"),
        (["--num-tokens", "8", "-1"], "num-tokens must be in [0, N] with N=576 patches, got -1"),
        (["--num-tokens", "a"], "argument --num-tokens: invalid int value: 'a'"),
        (["--keep", "1.5"], "keep must be in [0, 1], got 1.5"),
        (["--keep", "nan"], "keep must be in [0, 1], got nan"),
        (["--method", "a"], "argument --method: invalid choice: 'a'"),
        (["--backend", "a"], "argument --backend: invalid choice: 'a'"),
        (["--device", "a"], "device must be one that torch can use here, got 'a' (Expected one of cpu, cuda,"),
        (["--device", "meta"], "device must be one that torch can use here, got 'meta' (Tensor.item()"),
        (["--device", "cuda:99"], "device must be one that torch can use here, got 'cuda:99' ("),
        (["--out", "a.jpg"], "out must end in .png, got 'a.jpg'"),
        (["--out", "missing/a.png"], "out must be a writable file, got 'missing/a.png' (No such file or directory)"),
        (["--out", "folder.png"], "out must be a writable file, got 'folder.png' (Is a directory)"),
        (["--out", "photo.png"], "out must be another file than the photo, got 'photo.png'"),
    ],
)
def test_demo_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("photo.png").symlink_to(PHOTO)
    before = PHOTO.read_bytes()
    with pytest.raises(SystemExit) as status:
        main(["demo", "photo.png", *arguments])
    out, error = capsys.readouterr()
    assert status.value.code == 2
    assert error.startswith(f"hvprune demo: {message}")
    assert error.count("\n") == 1
    assert not out
    assert PHOTO.read_bytes() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo_runs_or_says_why_a_backend_cannot(tmp_path, monkeypatch, capsys, backend):
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", str(PHOTO), "--grid", "6", "--method", "hivtp", "--backend", backend]
    reason = OPS["attention_importance"].why_unavailable(backend, "cpu")
    if reason is None:
        assert main(arguments) == 0
        assert Path("chelsea_pruned.png").exists()
        assert f" {backend} " in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2
        assert f"backend {backend!r} is unavailable: {reason}" in capsys.readouterr().err


def test_demo_exits_1_when_a_result_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("hvprune.demo._agree", lambda result, expected: False)
    arguments = ["demo", str(PHOTO), "--grid", "6", "--out", str(tmp_path / "out.png")]
    assert main(arguments) == 1


@pytest.mark.parametrize("arguments", [[], ["a"], ["demo"], ["info", "a"]])
def test_wrong_commands_exit_2_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_module_is_the_command(tmp_path):
    run = [sys.executable, "-m", "hvprune"]
    environment = {"PYTHONPATH": str(Path(hvprune.__file__).parents[1]), "PATH": ""}
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (version.returncode, version.stdout) == (0, f"hvprune {hvprune.__version__}\n")
    nothing = subprocess.run([*run, "demo"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (nothing.returncode, nothing.stdout) == (2, "")


def test_info_reports_what_is_the_case(capsys):
    assert main(["info"]) == 0
    report = values(capsys.readouterr().out)
    assert report["hvprune"].strip() == hvprune.__version__
    assert report["backend reference"].strip() == "available"
    assert (report["backend cpu"].strip() == "available") == (_native.C is not None)
    for backend in BACKENDS:
        assert report[f"backend {backend}"].strip().startswith(("available", "unavailable: "))
    if _native.C is not None:
        assert report["instruction set"].split()[0] == _native.C.cpu_isa()


def test_info_without_the_extension(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "_IMPORT_ERROR", "it is gone")
    for op in OPS.values():
        monkeypatch.setattr(op, "_chosen", {})
    report = values(info.report())
    assert report["instruction set"].strip() == "none: hvprune._C is not built"
    assert report["CUDA archs"].strip() == "none compiled in"
    assert report["backend cpu"].strip() == "unavailable: hvprune._C could not be imported: it is gone"
    assert "reference for cpu tensors" in report["backend auto"]


def test_info_says_why_triton_does_not_run(monkeypatch):
    def triton():
        return values(info.report())["backend triton"].strip()

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton() == "available, interpreted on a CPU (TRITON_INTERPRET=1)"
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert triton() == "unavailable: triton must be 3.6 or newer, got 3.5.1"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton() == "unavailable: torch sees no GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly)"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton() == "unavailable: triton is not installed"


def test_info_lists_the_archs(monkeypatch):
    class Extension:
        cuda_archs = (80, 90)

    monkeypatch.setattr(_native, "C", Extension)
    assert info._cuda_archs() == "sm_80, sm_90"


def test_info_names_the_ops_that_a_backend_lacks(monkeypatch):
    monkeypatch.setattr(OPS["gather_tokens"], "backends", {})
    missing = "gather_tokens: this version of hvprune has no reference kernels"
    assert info._availability("reference") == f"available, except {missing}"
