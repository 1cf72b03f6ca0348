"""JavaScript that a web package contains: taken from a node_modules folder, never downloaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from faq_onnx.errors import PackageError

__all__ = ["INSTALL_COMMAND", "LIBRARY_FOLDER", "WebLibraries", "find_libraries"]

LIBRARY_FOLDER = "lib"
_FOLDER = "node_modules"
_ORT = "onnxruntime-web"
_TRIED = "1.30.0"
# Files of each package, and what the page calls them.
_FILES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        _ORT: {
            f"dist/{name}": name
            for name in (
                "ort.webgpu.bundle.min.mjs",
                "ort-wasm-simd-threaded.asyncify.mjs",
                "ort-wasm-simd-threaded.asyncify.wasm",
                "ort.wasm.bundle.min.mjs",
                "ort-wasm-simd-threaded.mjs",
                "ort-wasm-simd-threaded.wasm",
            )
        },
        "@huggingface/tokenizers": {"dist/tokenizers.min.mjs": "tokenizers.mjs"},
        "@huggingface/jinja": {"dist/index.js": "jinja.mjs"},
    }
)
INSTALL_COMMAND = f"npm install --ignore-scripts {' '.join(_FILES)}"
# What a browser loads to compute on each provider.
BINARIES: Mapping[str, str] = MappingProxyType(
    {
        "webgpu": "ort-wasm-simd-threaded.asyncify.wasm",
        "wasm": "ort-wasm-simd-threaded.wasm",
    }
)
# Packages of MIT licence that bring no copy of it.
_MIT_OWNERS = MappingProxyType({_ORT: "Microsoft Corporation"})
_MIT = """MIT License

Copyright (c) {owner}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclasses.dataclass(frozen=True)
class WebLibraries:
    """A node_modules folder that has all of them.

    Attributes:
        folder: The folder.
        versions: By package.
    """

    folder: Path
    versions: Mapping[str, str]

    def copy_to(self, folder: Path) -> None:
        """Copy what the page loads, and the licences."""
        folder.mkdir(exist_ok=True)
        texts = []
        for package, files in _FILES.items():
            place = self.folder / package
            for name, new_name in files.items():
                shutil.copyfile(place / name, folder / new_name)
            texts.append(f"{package} {self.versions[package]}\n\n{_licence(place, package)}")
        rule = f"\n{'-' * 79}\n\n"
        (folder / "LICENSES.txt").write_text(rule.join(texts), encoding="utf-8")


def find_libraries(given: Path | None) -> WebLibraries:
    """The libraries in a folder that the user names, else in ./node_modules.

    Args:
        given: A node_modules folder, or one that has such a folder in it.

    Raises:
        PackageError: Some are missing; says what to run.
    """
    root = Path.cwd() if given is None else given.expanduser()
    folder = root / _FOLDER if (root / _FOLDER).is_dir() or given is None else root
    versions = {name: _version(folder / name) for name in _FILES}
    missing = [name for name, version in versions.items() if not version]
    if missing:
        raise PackageError(
            f"--target web puts the browser's runtime into the package, and {folder} has no "
            f"{', no '.join(missing)}; run `{INSTALL_COMMAND}` here, or name a folder that "
            f"has them: --target-option node_modules=DIR"
        )
    for package, files in _FILES.items():
        for name in files:
            if not (folder / package / name).is_file():
                raise PackageError(
                    f"{folder / package}: version {versions[package]} has no {name}; tried was "
                    f"{_ORT} {_TRIED}: npm install {_ORT}@{_TRIED}"
                )
    return WebLibraries(folder, versions)


def _version(place: Path) -> str:
    """Of an installed package; "" where it is not."""
    path = place / "package.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return ""


def _licence(place: Path, package: str) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8")
    return _MIT.format(owner=_MIT_OWNERS.get(package, f"the authors of {package}"))
