"""`python -m faq_onnx` is the command `faq-onnx`."""

from __future__ import annotations

import sys

from faq_onnx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
