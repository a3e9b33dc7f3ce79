"""The probes: each has an answer and a reason, and none raises."""

from __future__ import annotations

import pytest

from kinora.kernels import toolchain


def test_every_probe_answers_with_a_reason() -> None:
    found = toolchain.probes()
    assert len({probe.name for probe in found}) == len(found)
    assert all(probe.reason and "\n" not in probe.reason for probe in found)
    named = {probe.name: probe for probe in found}
    assert {"sdpa flash", "sdpa cudnn", "triton", "xformers", "flex attention"} <= set(named)


def test_a_probe_that_breaks_is_a_no_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"{name} has the wrong ABI\nand more")

    monkeypatch.setattr(toolchain.importlib, "import_module", broken)
    named = {probe.name: probe for probe in toolchain.probes()}
    assert not named["xformers"].available
    assert named["xformers"].reason == "xformers has the wrong ABI"
