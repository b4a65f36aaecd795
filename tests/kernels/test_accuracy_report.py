"""The accuracy report: it passes with the backends as they are, and catches broken ones."""

import pytest
import torch

from vim_ssl.kernels.selective_scan import accuracy, torch_backend
from vim_ssl.kernels.selective_scan.accuracy import Case

ORDINARY = Case(two_way=True, b=1, l=5, d=3, n=2)


@pytest.fixture(autouse=True)
def uninterpreted(monkeypatch):
    """Without the Triton backend, which takes seconds for everything in its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def broken(monkeypatch):
    """Replace the torch backend's output by a function of it."""
    right = torch_backend.bi_selective_scan

    def replace(change):
        monkeypatch.setattr(
            torch_backend, "bi_selective_scan", lambda *a, **k: change(right(*a, **k))
        )

    return replace


def test_every_cpu_backend_is_within_its_bounds(capsys):
    assert accuracy.main(["--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    for name in ("reference", "torch", "numba"):
        assert f" {name} " in printed
    assert "24 of 24 equal" in printed
    assert "BROKEN" not in printed


def test_wrong_numbers_fail_the_report(broken, capsys):
    broken(lambda y: y * 1.001)
    assert accuracy.main(["--device", "cpu", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN torch, both ways, b1 l63 d7 n5, fp32: y 1.0e-03; expected at most" in printed
    assert "BROKEN numba" not in printed


def test_markdown_is_a_table(capsys):
    accuracy.report("cpu", markdown=True, cases=[ORDINARY])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[1].startswith("|---|")


MISTAKES = {
    "an error": (lambda y: y[0, 0, 99], "a result"),
    "memory it never wrote": (lambda y: y + 0 * torch.empty_like(y), "at most 1.0e-05"),
    "chance": (lambda y: y + 1e-7 * torch.randn_like(y), "two runs equal bit for bit"),
}


@pytest.mark.parametrize(("change", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_row_names_the_violated_bound(broken, change, expected):
    broken(change)
    assert expected in accuracy.measure(ORDINARY, "torch", "cpu").broken.values()


def test_half_precision_is_held_against_the_plain_path(broken):
    case = Case(two_way=True, b=1, l=40, d=3, n=2, dtype="bf16")
    assert not accuracy.measure(case, "torch", "cpu").broken
    broken(lambda y: y * 1.01)
    assert "y" in accuracy.measure(case, "torch", "cpu").broken


def test_lost_infinities_are_reported(broken):
    broken(lambda y: y.nan_to_num())
    row = accuracy.measure_non_finite("torch", "cpu")
    assert "nan in u" in row.broken["note"]


def test_a_backend_that_cannot_run_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names, left_out = accuracy.runnable("cpu")
    assert names == ["reference", "torch", "numba"]
    assert left_out == ["skipped: triton. Backend 'triton' runs on cuda tensors; these are on cpu."]
