"""Write what docs/ says about settings anew from the configuration: `make docs`.

tests/contract/test_docs.py fails while they differ.
"""

from __future__ import annotations

from pathlib import Path

from faq_onnx.cli.options import settings_markdown
from faq_onnx.recipes import recipe_schema
from faq_onnx.targets.opening import options_markdown

BEGIN = "<!-- settings: written by tools/write_docs.py -->\n"
END = "<!-- end of settings -->\n"


def main() -> None:
    """Write docs/recipe.schema.json and the settings in docs/cli.md and docs/targets.md."""
    docs = Path(__file__).resolve().parents[1] / "docs"
    (docs / "recipe.schema.json").write_text(recipe_schema(), encoding="utf-8")
    for name, text in {"cli.md": settings_markdown(), "targets.md": options_markdown()}.items():
        page = docs / name
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
