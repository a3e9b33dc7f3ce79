"""What a method cannot do is one line with the remedy, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from kinora.accel import recipe as recipes
from kinora.accel.errors import RecipeError
from kinora.accel.methods import METHODS
from kinora.accel.parts import ATTENTION

Cli = Callable[..., Any]
SMALL = ("--size", "128x128", "--frames", "5", "--steps", "2")


@pytest.fixture(scope="module")
def calibration(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny Wan pipeline, 2×16×16 tokens."""
    from kinora.app.cli import main

    path = tmp_path_factory.mktemp("calibrations") / "paro.npz"
    assert main(["calibrate", str(wan_folder), *SMALL, "-o", str(path)]) == 0
    return path


def paro(path: Path | str) -> tuple[str, ...]:
    recipe = ("attention.method=paro", f"attention.calibration={path}", "when=always")
    return tuple(part for it in recipe for part in ("--set", it))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kinora.pipelines.models.load", forbidden)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("size", "here"),
    [(("128x128", 9), "3×16×16"), (("160x128", 5), "2×16×20"), (("128x128", 1), "1×16×16")],
)
def test_a_calibration_of_another_grid(
    cli: Cli, wan_folder: Path, calibration: Path, size: tuple[str, int], here: str
) -> None:
    given = ("--model", wan_folder, "--size", size[0], "--frames", size[1], *paro(calibration))
    for command in (("generate", "a"), ("inspect", "a"), ("plan",)):
        called = cli(*command, *given)
        told = called.complaint
        assert called.status == 2 and "tokens 2×16×16 and 0 of text in 2 layers" in told
        assert f"here are {here}" in told and "calibrate for this model and size" in told


@pytest.mark.usefixtures("unloaded")
def test_a_calibration_of_another_model(
    cli: Cli, model_folders: dict[str, Path], calibration: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model_folders["wan"], tmp_path / "other")
    (file,) = (other / "transformer").glob("*.safetensors")
    save_file({name: it + 1 for name, it in load_file(file).items()}, file, {"format": "pt"})
    given = ("--model", other, *SMALL, *paro(calibration))
    for command in (("generate", "a"), ("inspect", "a")):
        told = cli(*command, *given).complaint
        assert "paro.npz was calibrated with other weights, of " in told
        assert "make one for this model with `kinora calibrate`" in told
    planned = cli("plan", *given)
    assert planned.status == 2 and "refused" in planned.out
    assert "paro.npz was calibrated with other weights" in planned.complaint
    flux = ("--model", model_folders["flux"], "--size", "128x128", *paro(calibration))
    assert "kinora calibrate" in cli("generate", "a", *flux).complaint


def test_the_same_weights_may_lie_elsewhere(
    cli: Cli, wan_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(wan_folder, tmp_path / "moved")
    called = cli("generate", "a", "--model", moved, *SMALL, *paro(calibration), "--json")
    assert called.status == 0, called.err
    assert called.last["outputs"][0]["receipt"]["attention"]["kernels"]


@pytest.mark.usefixtures("unloaded")
def test_a_file_that_is_no_calibration(
    cli: Cli, wan_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    whole = calibration.read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.npz").mkdir()
    for name, told in (
        ("nowhere.npz", "there is no calibration"),
        ("text.npz", "is no calibration file"),
        ("arrays.npz", "is no calibration file"),
        ("half.npz", "is no calibration file"),
        ("folder.npz", "is no calibration file"),
        ("", "paro needs attention.calibration, a file"),
    ):
        path = tmp_path / name if name else ""
        called = cli("generate", "a", "--model", wan_folder, *SMALL, *paro(path))
        assert called.status == 2 and told in called.complaint, called.err
        assert "make one with `kinora calibrate`" in called.complaint


@pytest.mark.usefixtures("unloaded")
def test_a_dense_kernel_that_is_not_there(cli: Cli, wan_folder: Path) -> None:
    given = ("--model", wan_folder, *SMALL, "--device", "cpu", "--set", "dense_kernel=sage")
    told = "kinora: the dense kernel sage cannot run on cpu: it is for CUDA devices; available are "
    for command in (("generate", "a"), ("inspect", "a"), ("plan",)):
        called = cli(*command, *given)
        assert called.status == 2 and called.err.startswith(told)
        assert called.err.count("\n") == 1  # nothing is said to be loading
    assert "dense kernel" in cli("plan", *given).out
    machine = cli("plan", *given, "--json")
    assert machine.status == 2 and machine.last["parts"][-1]["verdict"] == "refused"


def out_of_range() -> Iterator[tuple[str, str, str]]:
    """Method, option and value, for all methods that there are."""
    for name, method in METHODS.items():
        for it in ATTENTION.options(method):
            wrong = ["nan", "inf", "many"] if it.kind in (int, float) else []
            if it.least is not None:
                wrong.append(f"{it.least if it.above else it.least - 1:g}")
            if it.most is not None:
                wrong.append(f"{it.most + 1:g}")
            if it.choices:
                wrong.append(f"{it.choices[0]}x")
            if it.kind is bool:
                wrong.append("maybe")
            yield from ((name, it.name, value) for value in wrong)


@pytest.mark.parametrize(("method", "option", "value"), list(out_of_range()))
def test_an_option_out_of_range(method: str, option: str, value: str) -> None:
    known = {it.name: it for it in ATTENTION.options(METHODS[method])}
    with pytest.raises(RecipeError) as caught:
        recipes.changed(
            recipes.find("dense"), [f"attention.method={method}", f"attention.{option}={value}"]
        )
    told = str(caught.value)
    assert told.startswith(f"attention.{option} must be {known[option].allowed()}, not {value}")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "paro"])
def test_no_method_serves_a_model_of_which_nothing_is_known(
    cli: Cli, unknown_folder: Path, method: str
) -> None:
    given = ("--model", unknown_folder, "--size", "32x32", "--frames", "5", "--set")
    called = cli("generate", "a", *given, f"attention.method={method}", "--strict")
    assert called.status == 2 and "choose --recipe dense" in called.complaint
    assert cli("generate", "a", *given, f"attention.method={method}").complaint == called.complaint


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [(), ("when=always",), ("when=always", "tile")])
def test_a_strict_run_is_refused_or_sparse(
    cli: Cli, wan_folder: Path, calibration: Path, method: str, settings: tuple[str, ...]
) -> None:
    """Whatever a method makes of 512 tokens, a run that is strict never goes on without it."""
    chosen = [f"attention.method={method}", *(it for it in settings if it != "tile")]
    if "tile" in settings and "tile" in {it.name for it in ATTENTION.options(METHODS[method])}:
        chosen.append("attention.tile=64x64")
    if method == "paro":
        chosen.append(f"attention.calibration={calibration}")
    asked = [part for it in chosen for part in ("--set", it)]
    called = cli("generate", "a", "--model", wan_folder, *SMALL, *asked, "--strict", "--json")
    if called.status:
        assert called.status == 2 and called.last["kind"] == "AccelerationError"
        assert "strict: attention would not run as asked" in called.complaint
        assert "--no-strict" in called.complaint and not list(Path().glob("**/*.mp4"))
        predicted = "predicted to take" in called.complaint
        assert ("run it anyway (when=always)" in called.complaint) == predicted
        return
    ran = called.last["outputs"][0]["receipt"]["attention"]
    first = {"in the first 20% of the steps": ran["calls"] // 2}
    assert sum(ran["kernels"].values()) == ran["calls"] // 2 and ran["dense"] == first


def test_a_strict_run_that_would_accelerate_nothing_is_refused_and_without_strict_told(
    cli: Cli, wan_folder: Path
) -> None:
    whole = ("--set", "attention.method=top-blocks", "--set", "attention.keep=1")
    whole += ("--set", "attention.from_step=0")
    asked = ("generate", "a", "--model", wan_folder, *SMALL, *whole)
    strict = cli(*asked, "--strict")
    assert (
        strict.status == 2
        and "all calls run dense because keep 1 is all of 8 tiles" in strict.complaint
    )
    told = cli(*asked)
    assert (
        told.status == 0 and "the recipe accelerates nothing here: all calls run dense" in told.err
    )
