"""The checks and measurements of benchmarks/gpu.py: on a GPU with `-m gpu`, and with the CPU in its place."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_measurements

QUICK = (
    "encode-fp32", "encode-bf16", "decode-bf16", "tiles-fp32", "overflow", "text-bf16", "draw-ddim-bf16",
    "draw-ddpm-fp32", "alone-bf16", "cache", "train-lora-bf16",
)  # fmt: skip


def on_the_cpu(tmp_path: Path) -> gpu_checks.Place:
    return gpu_checks.Place(torch.device("cpu"), tmp_path / "scratch", steps=2, tiny=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    try:
        gpu_checks.run(name, gpu_checks.Place(torch.device("cuda:0"), tmp_path))
    except gpu_checks.NotRunError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", QUICK)
def test_with_the_cpu_in_its_place(name: str, tmp_path: Path) -> None:
    assert gpu_checks.run(name, on_the_cpu(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("name", [name for name in gpu_checks.CHECKS if name not in QUICK])
def test_with_the_cpu_in_its_place_slow(name: str, tmp_path: Path) -> None:
    try:
        assert gpu_checks.run(name, on_the_cpu(tmp_path))
    except gpu_checks.NotRunError as error:
        pytest.skip(str(error))


def test_a_check_notices_wrong_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder with a slightly wrong weight must fail its check."""
    vae = gpu_checks._vae("cpu", "bf16")
    with torch.no_grad():
        monkeypatch.setattr(vae, "scale", vae.scale * 1.05)
    with pytest.raises(AssertionError, match="above"):
        gpu_checks.run("encode-bf16", on_the_cpu(tmp_path))


def test_without_a_gpu_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "There is no GPU that PyTorch can use here; run this on a machine with one.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_results_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes too long is stopped and reported."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu, "LIMITS", {"check": 120.0, "measure": 0.05})
    out = tmp_path / "results"
    chosen = ["encode-fp32", "train-unet-fp16", "vae-512"]
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out), "--only", *chosen]) == 1
    results = json.loads((out / "results.json").read_text())
    outcomes: dict[str, Any] = {step["name"]: (step["outcome"], step["said"]) for step in results["steps"]}
    assert outcomes["encode-fp32"][0] == "passed"
    assert outcomes["train-unet-fp16"] == ("not run", "sdkit trains in fp16 on a GPU only")
    assert outcomes["vae-512"] == ("failed", "it took longer than 0 s and was stopped")
    assert results["machine"]["torch"] == torch.__version__
    assert all(name in (out / "results.md").read_text() for name in outcomes)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path), "--only", "encode"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(step["outcome"], step["said"]) for step in results["steps"]} == {("not run", "the time was up")}


PLAYER = """
import json, os, subprocess, sys, time
print(json.dumps({"process": os.getpid()}), flush=True)
for line in sys.stdin:
    kind, name = json.loads(line)
    if name == "dies":
        os._exit(9)
    if name == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(sys.argv[1], "w").write(str(child.pid))
        time.sleep(600)
    restart = {"restart": True} if name == "loses its device" else {}
    print(json.dumps({"outcome": "passed", "said": name, **restart}), flush=True)
    if name == "is the last":
        break
"""
"""A worker without libraries: it answers steps as a real one does, and fails in the ways that their names say."""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu.Worker]:
    monkeypatch.setattr(gpu, "LIMITS", {"check": 3.0})
    worker = gpu.Worker("cpu", tiny=True)
    worker.command = [sys.executable, "-c", PLAYER, str(tmp_path / "child")]
    yield worker
    worker.close()
    worker.scratch.cleanup()


def is_alive(process: str) -> bool:
    """Return whether there is a process of this number that has not ended."""
    try:
        state = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_worker_that_fails_costs_only_its_own_step(worker: gpu.Worker, tmp_path: Path) -> None:
    def said(name: str, failed: str = "") -> int:
        """Check a step's answer, and return the process that gave it."""
        answer = worker.do("check", name, time.monotonic() + 60)
        assert (answer["outcome"], answer["said"]) == (("failed", failed) if failed else ("passed", name))
        assert answer.keys() == {"outcome", "said", "seconds"}
        process: int = worker.machine["process"]
        return process

    first = said("good")
    assert said("good") == first
    assert said("dies", "its process ended with exit code 9") == first
    second = said("good")
    said("hangs", "it took longer than 3 s and was stopped")
    child, deadline = (tmp_path / "child").read_text(), time.monotonic() + 10
    while is_alive(child):  # what a worker has started ends with it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    third = said("loses its device")
    fourth = said("is the last")
    assert worker.process is not None
    worker.process.wait(30)
    assert len({first, second, third, fourth, said("good")}) == 5


def test_steps_are_not_run_where_no_worker_starts(worker: gpu.Worker) -> None:
    worker.command = [sys.executable, "-c", "raise SystemExit(3)"]
    answers = [worker.do("check", "good", time.monotonic() + 60) for _ in range(3)]
    told = [(answer["outcome"], answer["said"]) for answer in answers]
    assert told[:2] == [("failed", "its process did not start: exit code 3")] * 2
    assert told[2] == ("not run", "no process could be started for it")


def test_a_device_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    worker = gpu.Worker("cuda:99", tiny=True)
    try:
        answer = worker.do("check", "encode-fp32", time.monotonic() + 200)
    finally:
        worker.close()
        worker.scratch.cleanup()
    assert answer["outcome"] == "failed"
    assert answer["said"].startswith("its process did not start: ")
    assert "cuda" in answer["said"].lower() or "ordinal" in answer["said"]


def test_a_machine_that_lacks_a_library_is_told_to_bring_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.main(["--wheels", str(tmp_path)]) == 2
    monkeypatch.setattr(gpu, "LIBRARIES", ("numpy", "no_such_library"))
    assert gpu.main(["--device", "cpu"]) == 2
    monkeypatch.undo()
    assert gpu.main(["--device", "cpu", "--only", "paint"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"There are no wheels (*.whl) in {tmp_path}.",
        "Python lacks no_such_library here; bring wheels in a folder: --wheels FOLDER.",
        "No step's name begins so; --list prints the names.",
    ]


def test_steps_that_compile_come_last() -> None:
    names = [name for _, name in gpu._steps(None)]
    last = [name for name in names if "compile" in name]
    assert names[-len(last) :] == last
    assert {"compile", "draw-8-compiled"} <= {*last}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("name", [name for name in gpu_measurements.MEASUREMENTS if "compiled" not in name])
def test_measurements_with_the_cpu_in_its_place(name: str, tmp_path: Path) -> None:
    place = on_the_cpu(tmp_path)
    place.scratch.mkdir()
    numbers = gpu_measurements.MEASUREMENTS[name](place)
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
    assert gpu_measurements.summary(numbers)
