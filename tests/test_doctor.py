"""doctor: each thing that goes wrong is found, named, and turns the exit status."""
import sys
from importlib import metadata
from pathlib import Path

import pytest

from oodrepro import datasets, doctor, execution, reproduce
from oodrepro.doctor import Finding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def quick(monkeypatch):
    """No kernel is started and no data set is looked at, unless a test asks for it."""
    monkeypatch.setattr(doctor, "kernel", lambda: [Finding("kernel", "good", "not looked at")])
    monkeypatch.setattr(doctor, "data", lambda root: [Finding("data", "good", "not looked at")])


def test_a_sound_installation(quick, tmp_path, capsys):
    assert reproduce.main(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "  ok   python: " in out and sys.executable in out and "0 wrong" in out and "GB free" in out


def test_a_missing_package_is_wrong(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_needed", lambda: ["numpy", "no-such-package"])
    assert reproduce.main(["doctor", "--root", str(tmp_path)]) == 1
    assert "WRONG  packages: missing: no-such-package; pip install" in capsys.readouterr().out


def test_other_versions_are_noted_and_no_fault(quick, tmp_path, capsys, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nnumpy==1.0.0\nscipy==" + metadata.version("scipy") + "\n")
    monkeypatch.setattr(doctor, "_constraints", lambda: pins)
    assert reproduce.main(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"  note packages: not the tested versions: numpy {metadata.version('numpy')} (tested: 1.0.0)" in out
    monkeypatch.setattr(doctor, "_constraints", lambda: None)
    assert reproduce.main(["doctor", "--root", str(tmp_path)]) == 0
    assert "constraints.txt is not at hand" in capsys.readouterr().out


def test_the_tested_set_covers_what_is_required():
    tested = doctor.tested_versions((ROOT / "constraints.txt").read_text())
    missing = [name for name in doctor._needed() if name.replace("_", "-") not in tested]
    assert missing == [] and tested["torch"] and len(tested) > 100


def test_a_kernel_of_another_python(monkeypatch):
    def elsewhere(notebook, output, parameters, log):
        log('["/usr/bin/another", "/site/oodrepro/__init__.py", 4]')
    monkeypatch.setattr(doctor, "execute", elsewhere)
    found = doctor.kernel()
    assert [one.state for one in found] == ["wrong"] and "/usr/bin/another" in found[0].words


def test_a_kernel_that_cannot_import(monkeypatch):
    def broken(notebook, output, parameters, log):
        raise execution.NotebookFailed("cell 3 failed with ModuleNotFoundError: No module named 'oodrepro'")
    monkeypatch.setattr(doctor, "execute", broken)
    assert doctor.kernel()[0].state == "wrong" and "No module named 'oodrepro'" in doctor.kernel()[0].words


def test_damaged_data_are_wrong(quick, tmp_path, monkeypatch):
    monkeypatch.undo()
    entry = datasets.info("mnist")
    (tmp_path / "mnist").mkdir()
    for file in entry.files:
        (tmp_path / "mnist" / file.name).write_bytes(b"no images")
    found = doctor.data(tmp_path)
    assert found[0].state == "wrong" and "mnist" in found[0].words and "oodrepro data verify mnist" in found[0].words


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e8}))
    states = {one.what: one.state for one in doctor.machine(tmp_path)}
    assert states["disk"] == "wrong"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert {one.what: one.state for one in doctor.machine(tmp_path)}["folder"] == "wrong"


def test_a_kernel_of_ours():
    assert [one.state for one in doctor.kernel()] == ["good", "good"]
