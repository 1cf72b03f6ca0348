"""The web target without a browser: what it refuses, and what it puts into a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import ModelOutline, PlannedWeight
from faq_onnx.cli.main import main
from faq_onnx.errors import ConfigError, PackageError, UnsupportedModelError
from faq_onnx.graph.io import load_model
from faq_onnx.targets.browser import find_browser
from faq_onnx.targets.opening import open_target
from faq_onnx.targets.web_libraries import INSTALL_COMMAND, find_libraries
from faq_onnx.targets.web_model import PageConfig, check_decoder, describe_decoder, text_facts
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, write_tiny_llama

PAGE = Path(__file__).parents[3] / "faq_onnx" / "targets" / "web_page"


@pytest.fixture
def npm(tmp_path: Path) -> Path:
    """A node_modules folder with the names of the files; nothing here executes them."""
    files = {
        "onnxruntime-web": [
            *(f"dist/ort.{kind}.bundle.min.mjs" for kind in ("webgpu", "wasm")),
            *(
                f"dist/ort-wasm-simd-threaded{kind}.{end}"
                for kind in ("", ".asyncify")
                for end in ("mjs", "wasm")
            ),
        ],
        "@huggingface/tokenizers": ["dist/tokenizers.min.mjs", "LICENSE"],
        "@huggingface/jinja": ["dist/index.js", "LICENSE"],
    }
    for package, names in files.items():
        for name in names:
            path = tmp_path / "node_modules" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package} {name}")
        (tmp_path / "node_modules" / package / "package.json").write_text('{"version": "1.2.3"}')
    return tmp_path / "node_modules"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "story teller"
    write_tiny_llama(folder)
    return folder


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHROME_PATH", str(tmp_path / "no such browser"))


def _package(source: Path, out: Path, npm: Path, *words: str) -> int:
    place = f"node_modules={npm}"
    command = ["package", str(source), "-o", str(out), "--target", "web", "-q"]
    return main([*command, "--target-option", place, *words])


def _manifest(folder: Path) -> Any:
    return json.loads((folder / "package.json").read_text())


@pytest.mark.usefixtures("no_browser")
def test_the_folder_is_complete(source: Path, tmp_path: Path, npm: Path) -> None:
    out = tmp_path / "out"
    assert _package(source, out, npm) == 0
    assert {path.name for path in PAGE.iterdir()} <= {path.name for path in out.iterdir()}
    config = PageConfig.load(out / "model.json")
    assert config.name == "story teller"
    for file in config.files:
        assert (out / file.file).stat().st_size == file.bytes
    assert config.data == ("model.onnx.data",)
    assert (config.context, config.ends, config.template) == (512, (257,), None)
    assert config.inputs["input_ids"] == "int64"
    assert [entry.present for entry in config.cache][:2] == ["present.0.key", "present.0.value"]
    assert not config.float16
    assert config.download_bytes("wasm") < sum(file.bytes for file in config.files)
    licences = (out / "lib" / "LICENSES.txt").read_text()
    assert "Copyright (c) Microsoft Corporation" in licences
    assert "@huggingface/jinja LICENSE" in licences


@pytest.mark.usefixtures("no_browser")
def test_without_a_browser_nothing_passed(
    source: Path, tmp_path: Path, npm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _package(source, out, npm) == 0
    checks = _manifest(out)["proof"]["checks"]
    assert len(checks) == 3  # a float model has nothing packed
    assert all(check["passed"] is None for check in checks)
    assert all(check["value"].startswith("not tried: no Chromium") for check in checks)
    assert _manifest(out)["proof"]["versions"]["onnxruntime-web"] == "1.2.3"
    assert main(["verify", str(out), "-q"]) == 0
    assert "not tried" in capsys.readouterr().out
    assert _package(source, out, npm, "--force") == 0  # replaces a folder with a folder in it


@pytest.mark.usefixtures("no_browser")
def test_convert_fills_the_same_folder(source: Path, tmp_path: Path, npm: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n}: line {n * n} of {n % 7}" for n in range(300)))
    out = tmp_path / "out"
    words = ["convert", str(source), "-o", str(out), "--method", "rtn", "--max-kl", "9", "-q"]
    words += ["--target", "web", "--target-option", f"node_modules={npm}"]
    words += ["--calibration", str(text), "--sequence-length", "32", "--verify-samples", "2"]
    assert main([*words, "--target-option", "title=Tales"]) == 0
    assert PageConfig.load(out / "model.json").name == "Tales"
    assert (out / "report.json").is_file()
    assert (out / "index.html").is_file()


def test_missing_libraries_are_told_before_the_work(
    source: Path, tmp_path: Path, npm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("package", "convert"):
        words = [command, str(source), "-o", str(tmp_path / "out"), "--target", "web", "-q"]
        assert main([*words, "--target-option", f"node_modules={tmp_path / 'no'}"]) == 8
        error = capsys.readouterr().err
        assert INSTALL_COMMAND in error
        assert "no onnxruntime-web, no @huggingface/tokenizers" in error
    assert not (tmp_path / "out").exists()
    (npm / "onnxruntime-web" / "dist" / "ort.wasm.bundle.min.mjs").unlink()
    with pytest.raises(PackageError, match=r"version 1\.2\.3 has no dist/ort\.wasm"):
        find_libraries(npm)


def test_libraries_lie_in_the_folder_or_above_it(
    npm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_libraries(npm).folder == npm
    assert find_libraries(npm.parent).folder == npm
    monkeypatch.chdir(npm.parent)
    assert find_libraries(None).versions["onnxruntime-web"] == "1.2.3"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_page_needs_tokenizer_and_config(source: Path, name: str) -> None:
    (source / name).unlink()
    path = source / "model.onnx"
    found = SourceModel(given="tale", onnx_path=path, folder=source)
    with pytest.raises(PackageError, match=f"tale: has no {name}"):
        check_decoder(found, load_model(path))


def test_a_graph_without_a_cache_is_refused() -> None:
    model = tiny_llama_onnx(TinyLlama())
    outputs = [value for value in model.graph.outputs if value.name == "logits"]
    model.graph.outputs[:] = outputs
    with pytest.raises(UnsupportedModelError, match="key/value cache"):
        describe_decoder(model, "tale")


def _outline(*weights: PlannedWeight, size: int = 1000) -> ModelOutline:
    return ModelOutline(weights=weights, model_bytes=size)


def _weight(kind: Any, rows: int, *, bits: int | None = None) -> PlannedWeight:
    fmt = None
    if bits is not None:
        fmt = BlockFormat(code_bits=bits, storage_bits=bits, block_size=32, symmetric=True)
    return PlannedWeight(
        place="embed", kind=kind, rows=rows, width=4096, dtype="float32", format=fmt
    )


def test_what_no_browser_holds_is_refused() -> None:
    target = open_target("web")
    assert target.refusals(_outline(_weight("embedding", 32000))) == ()
    (size,) = target.refusals(_outline(size=3_600_000_000))
    assert (size.place, size.found) == ("the model", "3.6 GB")
    assert "4 GiB" in size.allowed
    (table,) = target.refusals(_outline(_weight("embedding", 256_000)))
    assert (table.found, table.way_out) == ("a tensor of 4.2 GB", "--embedding 4")
    assert target.refusals(_outline(_weight("embedding", 256_000, bits=4))) == ()


@pytest.mark.parametrize("value", ["0", "much"])
def test_options_are_checked(value: str) -> None:
    with pytest.raises(ConfigError, match="piece_mb"):
        open_target("web", {"piece_mb": value})


def test_the_template_is_found_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert text_facts(tmp_path) == (2048, (7,), None)
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert text_facts(tmp_path)[2] == "D"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert text_facts(tmp_path)[2] == "one"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert text_facts(tmp_path) == (2048, (1, 2), "file")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(PackageError, match="not valid JSON"):
        text_facts(tmp_path)


@pytest.mark.usefixtures("no_browser")
def test_a_named_browser_that_is_not_there_is_none() -> None:
    assert find_browser() is None


def test_float16_is_told(source: Path) -> None:
    model = load_model(source / "model.onnx")
    value = next(iter(model.graph.initializers.values()))
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy().astype("float16"), name=value.name)
    assert describe_decoder(model, "tale").float16
