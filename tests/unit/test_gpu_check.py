"""The measurements and the page of tools.gpu_check, as far as a machine without a GPU can show them."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.gpu_check import __main__ as command
from tools.gpu_check import measure, page
from tools.gpu_check.loader import PoisonedBuffers
from tools.gpu_check.measure import MatrixProducts, launches, measured, median_ms, waits_for_device
from tools.gpu_check.rows import Row, Skip, compared, run_case
from tools.gpu_check.runner import Setting


def test_whatever_happens_in_a_case_is_a_row() -> None:
    def raising(error: Exception) -> Row:
        def case() -> Row:
            raise error

        return run_case("part", ("case", case))

    assert run_case("part", ("case", lambda: Row(ms=2.0))) == Row("part", "case", ms=2.0)
    assert raising(Skip("needs CUDA")) == Row("part", "case", skipped="needs CUDA", passed=None)
    assert raising(ModuleNotFoundError("", name="open_clip.loss")).skipped == "needs the package open_clip.loss"
    assert raising(ModuleNotFoundError("", name="atr_scale.gone")).passed is False
    failed = raising(RuntimeError("CUDA error: first line\nsecond line"))
    assert failed.passed is False and str(failed.error).startswith("RuntimeError: CUDA error: first line at test_gpu")
    assert compared(float("nan"), 1.0).passed is False and compared(1.0, 1.0).passed


def test_products_are_counted_in_both_passes_and_computed_alone() -> None:
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    out = torch.zeros(3, 3)
    with MatrixProducts() as recorded:
        (left @ right).square().sum().backward()
        out.addmm_(right[:3].mT.mT, torch.randn(7, 3))
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert recorded.flops == 2 * (3 * 5 * 7) + 2 * (3 * 7 * 5) + 2 * (3 * 7 * 3) + 2 * 2 * 3 * 4 * 5
    transposed = {product.right_transposed for product in recorded.counts if product.right == (7, 5)}
    assert transposed == {True}, "right.T of the backward pass"
    with MatrixProducts() as again:
        recorded.alone()()
    assert again.counts == recorded.counts


def test_everything_about_a_step_is_measured() -> None:
    setting = Setting("cpu", True, {"gemm fp32": Row(tflops=1e-3)})
    seen = []

    def fresh(number: int) -> tuple[torch.Tensor]:
        seen.append(number)
        return (torch.randn(40, 40),)

    row = measured(setting, lambda x: x @ x, fresh, repeats=3)
    assert row.ms is not None and row.tflops is not None and row.peak_mib is not None
    assert row.tflops == pytest.approx(2 * 40**3 / row.ms / 1e9) and row.share == pytest.approx(row.tflops / 1e-3)
    assert seen[-3:] == [0, 1, 2], "each timed call has data of its own"
    assert list(row.reference) == ["its matrix products alone"] and row.launches is row.syncs is None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of torch.cuda as the measurements call; `mode` is that of sync debugging."""
    state = SimpleNamespace(mode=0, clock=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = state.clock

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: state.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(state, "mode", mode))
    return state


def test_time_on_a_gpu_is_the_median_by_events(cuda: SimpleNamespace) -> None:
    taken = iter([3.0, 1.0, 2.0])

    def step(number: int) -> None:
        cuda.clock += next(taken)

    def fresh(number: int) -> tuple[int]:
        cuda.clock += 100  # outside of the events
        return (number,)

    assert median_ms(step, fresh, repeats=3) == 2.0


def test_waits_are_counted_with_their_places(cuda: SimpleNamespace) -> None:
    """torch warns in the frame that waits; the place is the innermost one of this project or of DeepSpeed."""
    code = "import warnings\ndef wait():\n    warnings.warn('called a synchronizing CUDA operation')\n"
    modules: dict[str, dict[str, Any]] = {name: {"__name__": name} for name in ("atr_scale.loss", "deepspeed.zero")}
    for scope in modules.values():
        exec(code, scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as DeepSpeed and other libraries set it
        with waits_for_device() as places:
            assert cuda.mode == "warn"
            modules["atr_scale.loss"]["wait"]()
            modules["atr_scale.loss"]["wait"]()
            modules["deepspeed.zero"]["wait"]()
            warnings.warn("another warning", stacklevel=1)
    assert cuda.mode == 0
    assert places == ["atr_scale.loss:3", "atr_scale.loss:3", "deepspeed.zero:3"]
    assert measure.counted(places) == "2 x atr_scale.loss:3, 1 x deepspeed.zero:3"


def test_launches_are_calls_of_the_driver(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no names of kernels, of annotated ranges, or of calls that put nothing on the device."""
    names = [
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync",
        "cudaStreamSynchronize", "ampere_sgemm_128x64_tn", "Optimizer.step#AdamW.step", "cudaEventRecord",
    ]  # fmt: skip
    results = SimpleNamespace(events=lambda: [SimpleNamespace(name=lambda name=name: name) for name in names])
    recorded = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    monkeypatch.setattr(measure, "profile", lambda **settings: nullcontext(recorded))
    assert launches(lambda: None) == 5


def test_a_buffer_is_poisoned_when_it_is_taken() -> None:
    buffers = PoisonedBuffers(size=6, each=1)
    buffers.take().memory[:] = 1
    buffers._busy[:] = 0
    assert bool(torch.from_numpy(buffers.take().memory).isnan().all())


def test_the_page_names_the_default_that_follows(tmp_path: Path) -> None:
    """The fastest kind of product whose gradients are exact enough; TF32 is faster here and is not."""
    times, errors = {"ieee": 9.0, "tf32": 2.0, "bf16x3": 3.0}, {"ieee": 1e-7, "tf32": 1e-3, "bf16x3": 2e-5}
    rows = [Row("loss-speed", f"nt_xent, B = 8,192, {kind}", ms=ms) for kind, ms in times.items()]
    rows += [
        Row("losses", f"nt_xent, embedding scores, temperature 0.07, {kind}", error=error, bound=1e-2)
        for kind, error in errors.items()
    ]
    lines = tmp_path / "lines"
    lines.write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))
    page.write_report(lines, tmp_path, quick=False)
    written = (tmp_path / "gpu_check.md").read_text()
    assert "is **bf16x3**" in written and "tf32 2 ms, error 1.0e-03" in written
    rows = [row for row in rows if not row.name.endswith("tf32") or row.part == "losses"]
    lines.write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))
    page.write_report(lines, tmp_path, quick=False)
    assert "Not measured here" in (tmp_path / "gpu_check.md").read_text(), "without a time of each kind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "nonsense"], "invalid choice: 'nonsense'"),
        (["--device", "cpu", "--out", "FILE"], "FILE (File exists): give another folder with --out"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # the command sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_part_that_is_named_runs_in_small_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a quick run leaves out."""
    ran: list[str] = []
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tools.gpu_check.__main__.run_parts", lambda parts, *_: ran.extend(p.name for p in parts) or [])
    arguments = ["--device", "cpu", "--quick", "--part", "engine-zero-3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert ran == ["ceilings", "engine-zero-3"]
