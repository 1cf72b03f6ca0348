"""The output folder is all or nothing."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import PackageError
from faq_onnx.targets.package import OutputFolder, check_free_space, copy_companions


def _old_output(path: Path) -> Path:
    path.mkdir()
    (path / "model.onnx").write_text("old")
    return path


def _write_half(output: Path, error: BaseException) -> None:
    with OutputFolder(output) as folder:
        (folder.path / "model.onnx").write_text("half")
        raise error


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_result_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with OutputFolder(output) as folder:
        (folder.path / "model.onnx").write_text("new")
        assert not output.exists()
        assert folder.path.parent == output.parent
    assert (output / "model.onnx").read_text() == "new"
    assert _names(output.parent) == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        _write_half(tmp_path / "a" / "out", error())
    assert _names(tmp_path) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    output = _old_output(tmp_path / "out")
    with pytest.raises(PackageError, match="use --force"), OutputFolder(output):
        pytest.fail("must not start")
    assert _names(tmp_path) == ["out"]


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with OutputFolder(output) as folder:
        (folder.path / "model.onnx").write_text("new")
    assert _names(output) == ["model.onnx"]


def test_force_replaces_only_after_success(tmp_path: Path) -> None:
    output = _old_output(tmp_path / "out")
    with pytest.raises(ValueError, match="stop"), OutputFolder(output, force=True):
        raise ValueError("stop")
    assert (output / "model.onnx").read_text() == "old"
    with OutputFolder(output, force=True) as folder:
        (folder.path / "plan.json").write_text("new")
        assert (output / "model.onnx").read_text() == "old"
    assert _names(output) == ["plan.json"]
    assert _names(tmp_path) == ["out"]


def test_force_does_not_delete_what_is_not_ours(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "x.json").write_text("{}")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "letter.txt").write_text("dear")
    for output in (home, texts):
        with pytest.raises(PackageError, match="does not look like"):
            OutputFolder(output, force=True).__enter__()
    with pytest.raises(PackageError, match="is not a folder"):
        OutputFolder(texts / "letter.txt", force=True).__enter__()
    assert (texts / "letter.txt").read_text() == "dear"


def test_the_source_is_kept(tmp_path: Path) -> None:
    source = _old_output(tmp_path / "model")
    model = source / "model.onnx"
    for output in (source, tmp_path, source / "out"):
        with pytest.raises(PackageError, match="choose a"):
            OutputFolder(output, source=source, force=True).__enter__()
    with pytest.raises(PackageError, match=r"the source .* lies there"):
        OutputFolder(source, source=model, force=True).__enter__()
    with OutputFolder(source / "out", source=model):
        pass
    assert model.read_text() == "old"


def test_a_full_disk_is_our_error_however_deep_it_is_wrapped(tmp_path: Path) -> None:
    wrapped = RuntimeError("pass failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PackageError, match="after writing 4 bytes"):
        _write_half(tmp_path / "out", wrapped)
    assert _names(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="cannot write there"):
        OutputFolder(tmp_path / "file" / "out").__enter__()


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(PackageError, match=r"1,000,000,000,000,000,000 bytes are needed"):
        check_free_space(tmp_path, 10**18)


@pytest.mark.parametrize("has_json", [True, False])
def test_companions(tmp_path: Path, has_json: bool) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    names = ["config.json", "tokenizer.model", "vocab.json", "model.safetensors", "LICENSE"]
    for name in [*names, *(["tokenizer.json"] if has_json else [])]:
        (source / name).write_text(name)
    (source / "config.json").chmod(0o600)
    model = SourceModel(given="m", onnx_path=source / "model.onnx", folder=source)
    copied = copy_companions(model, output)
    tokenizer = ["tokenizer.json"] if has_json else ["tokenizer.model", "vocab.json"]
    assert _names(output) == sorted(copied) == sorted(["config.json", "LICENSE", *tokenizer])
    bare = SourceModel(given="m", onnx_path=source / "model.onnx", folder=None)
    assert copy_companions(bare, output) == ()


def test_force_replaces_folders_that_the_manifest_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "web").mkdir(parents=True)
    (out / "web" / "page.html").write_text("x")
    (out / "package.json").write_text('{"files": {"web/page.html": 1}}')
    with OutputFolder(out, force=True) as made:
        (made.path / "model.onnx").write_bytes(b"")
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    (out / "web").mkdir()
    (out / "web" / "page.html").write_text("x")
    (out / "web" / "letter.txt").write_text("dear")
    (out / "package.json").write_text('{"files": {"web/page.html": 1}}')
    with pytest.raises(PackageError, match="does not look like"):
        OutputFolder(out, force=True).__enter__()
