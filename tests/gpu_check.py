"""``make gpu-check``: builds hvprune for the GPU at hand, tests it there and measures, in ten minutes, with no network.

Needs a Python with torch for CUDA, setuptools, pybind11, ninja, pytest and hypothesis, and nvcc; it gets a virtual
environment on top of it, and hvprune/ the extension for this GPU. What it finds goes to one folder, ``$OUT`` or
benchmarks/results/<gpu>: summary.txt, log.txt, probes.csv and micro.csv. HVPRUNE_BACKEND=triton (or cuda) restricts it
to that backend. A step that fails or takes too long is recorded and the next one runs; then the exit status is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MOST_WORKERS = 12
LINES_OF_A_FAILURE = 25
START = time.monotonic()


def find_gpu() -> tuple[str, int]:
    """Name and compute capability of the first GPU; ends the program if there is none."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu-check: {sys.executable} has no torch ({error})")
    if torch.version.cuda is None or not torch.cuda.is_available():
        sys.exit(f"gpu-check: needs an NVIDIA GPU, and torch {torch.__version__} of {sys.executable} sees none")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [f"{home}/{folder}/{name}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return next(filter(None, map(shutil.which, [name, *places])), None)


def make_environment() -> str:
    """The Python of a new virtual environment that also sees the packages of the one that runs this."""
    venv.create(WORK / "venv", clear=True, symlinks=True)
    (packages,) = (WORK / "venv" / "lib").glob("python*/site-packages")
    (packages / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    return str(WORK / "venv" / "bin" / "python")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Check:
    """Runs steps and keeps what came of them."""

    def __init__(self, results: Path):
        self.results, self.rows, self.good = results, [], True
        self.log = results / "log.txt"
        self.log.write_text("")

    def step(self, name: str, until: float, command: list, *, passed: str = "", **environment: str) -> bool:
        """Runs a command until so many seconds after the start of it all at most.

        It has passed if its exit status is 0 and a line of its output matches ``passed``.
        """
        print(f"gpu-check: {name} ...", flush=True)
        path, begin = WORK / f"{name}.log", time.monotonic()
        with path.open("w") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(max(5.0, until - (begin - START)))
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = path.read_text(errors="replace").splitlines()
        written = [line for line in lines if line.strip()]
        telling = [line for line in written if re.search(passed, line)]
        good = status == 0 and (not passed or bool(telling))
        verdict = "passed" if good else "timed out" if status is None else f"FAILED ({status})"
        self.record(name, verdict, time.monotonic() - begin, (telling or written or [""])[-1], good)
        with self.log.open("a") as log:
            log.write("\n".join([f"##### {name}: {' '.join(map(str, command))}", *lines, ""]) + "\n")
        if not good:
            print(f"----- end of {name}:", *lines[-LINES_OF_A_FAILURE:], "-----", sep="\n", flush=True)
        return good

    def record(self, name: str, verdict: str, seconds: float, remark: str, good: bool = True) -> None:
        remark = remark.strip("= ").replace(f"{self.results}/", "").replace(f"{ROOT}/", "")
        self.rows.append(f"{name:<10} {verdict:<12} {seconds:6.1f} s  {remark[:90]}")
        self.good &= good

    def summarise(self, header: list[str]) -> int:
        summary = "\n".join([*header, "", *self.rows]) + "\n"
        (self.results / "summary.txt").write_text(summary)
        print(f"\n{summary}results: {self.results}", flush=True)
        return 0 if self.good else 1


def sanitize(check: Check, sanitizer: str, calls: list, until: float) -> None:
    """All tools at once: most of what they do, they do on the CPU."""
    options = ["--target-processes", "application-only", "--error-exitcode", "1"]
    # NOTE: torch asks the driver for what it may lack; hvprune's own calls raise, so API errors need no watching.
    extra = {"memcheck": ["--report-api-errors", "no"]}

    def watch(tool: str) -> None:
        command = [sanitizer, "--tool", tool, *options, *extra.get(tool, []), *calls]
        clean = r"SUMMARY: 0 (errors|hazards displayed \(0 errors, 0 warnings\))"
        check.step(tool, until, command, passed=clean, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="2")

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        list(pool.map(watch, SANITIZERS))


def main() -> int:
    gpu, arch = find_gpu()
    only = os.environ.pop("HVPRUNE_BACKEND", "auto")
    if only not in ("auto", "cuda", "triton"):
        sys.exit(f"gpu-check: HVPRUNE_BACKEND must be 'auto', 'cuda' or 'triton', got {only!r}")
    backends = ["cuda", "triton"] if only == "auto" else [only]
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    results = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug).resolve()
    for folder in (WORK, results):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(WORK / "triton")}
    python, nvcc, sanitizer = make_environment(), find_tool("nvcc"), find_tool("compute-sanitizer")
    check = Check(results)
    header = [
        f"gpu-check of {' and '.join(backends)} on {gpu} (sm_{arch}),"
        f" {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit()}"
    ]

    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    wanted = {"HVPRUNE_CUDA": str(int("cuda" in backends)), "HVPRUNE_CUDA_ARCHS": str(arch)}
    if not check.step("build", 150, [*install, "--disable-pip-version-check", "--editable", ROOT], **wanted):
        return check.summarise(header)
    check.step("info", 165, [python, "-m", "hvprune", "info"], passed=rf"backend {backends[0]} +available")
    header += (WORK / "info.log").read_text(errors="replace").splitlines()

    if nvcc and arch >= 90:
        probes, source = WORK / "probes", ROOT / "benchmarks" / "probes" / "probes.cu"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        compiled = check.step("compile", 190, [nvcc, "-std=c++17", "-O3", target, "-o", probes, source])
        if compiled and check.step("probes", 215, [probes], passed=r"^copy,"):
            shutil.copy(WORK / "probes.log", results / "probes.csv")
    else:
        check.record("probes", "not run", 0, "they need nvcc and compute capability 9.0")

    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest += ["-k", " or ".join(f"{backend}-cuda" for backend in backends), "tests"]
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    parallel = ["-n", workers, "--dist", "worksteal"]
    some = r"\b[1-9]\d* passed"
    check.step("tests", 380, [*pytest, "-m", "gpu and not slow", *parallel], passed=some, OMP_NUM_THREADS="1")
    check.step("large", 440, [*pytest, "-m", "gpu and slow"], passed=some)
    if sanitizer:
        sanitize(check, sanitizer, [python, ROOT / "tests" / "sanitized.py", *backends], 510)
    else:
        check.record("sanitizers", "not run", 0, "no compute-sanitizer in PATH, CUDA_HOME or /usr/local/cuda")
    bench = [python, "-m", "hvprune", "bench", "--quick", "--csv", results / "micro.csv"]
    check.step("bench", 585, bench if only == "auto" else [*bench, "--backends", only])
    return check.summarise(header)


if __name__ == "__main__":
    sys.exit(main())
