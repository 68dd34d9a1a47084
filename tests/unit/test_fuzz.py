"""Damaged files through both pipelines; `make fuzz` takes more of them."""

from __future__ import annotations

import os
import signal

import pytest

from tests import fuzz


@pytest.mark.parametrize("pipeline", fuzz.PIPELINES)
@pytest.mark.parametrize("kind", fuzz.FILES)
def test_damaged_files_give_an_image_or_are_refused(kind, pipeline):
    outcome = fuzz.fuzz(kind, pipeline, 100)
    assert outcome.faults == []
    assert outcome.images + outcome.refused == 100 and min(outcome.images, outcome.refused) > 5


def test_crashes_and_errors_are_told_with_the_file(monkeypatch):
    """Real signals, in the processes that read."""
    faults = {3: lambda: os.kill(os.getpid(), signal.SIGSEGV), 4: lambda: os._exit(7), 6: lambda: {}["x"]}
    read = fuzz.damaged_file

    def damaged_file(kind: str, number: int) -> bytes:
        faults.get(number, lambda: None)()
        return read(kind, number)

    monkeypatch.setattr(fuzz, "damaged_file", damaged_file)
    outcome = fuzz.fuzz("BMP", "pil", 9)
    assert outcome.faults == ["BMP 3: ends with SIGSEGV", "BMP 4: ends with 7", "BMP 6: unexpected error"]
    assert outcome.images + outcome.refused == 6


def test_a_hang_is_ended(monkeypatch):
    monkeypatch.setattr(fuzz, "HANG_S", 1.0)
    monkeypatch.setattr(fuzz, "damaged_file", lambda kind, number: signal.pause() if number == 1 else b"")
    assert fuzz.fuzz("PNG", "pil", 3) == fuzz.Outcome(0, 2, ["PNG 1: hangs"])
