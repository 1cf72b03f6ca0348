"""The wheel that users install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_wheel_owns_one_top_level_name(tmp_path: Path) -> None:
    # setuptools takes files of an earlier build/ into the wheel, so build from a fresh copy.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("faq_onnx", "passes", "models"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    # Without isolation nothing is fetched; the environment has setuptools.
    subprocess.run([*command, str(tmp_path), "--no-build-isolation", str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"faq_onnx"}
    assert "faq_onnx/py.typed" in names
    for module in (ROOT / "passes").glob("*.py"):
        assert f"faq_onnx/passes/{module.name}" in names
    for file in (ROOT / "faq_onnx" / "targets" / "web_page").iterdir():
        assert f"faq_onnx/targets/web_page/{file.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
