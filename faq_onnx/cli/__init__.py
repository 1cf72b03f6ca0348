"""The command line: one thin file per command, each a call of `faq_onnx.pipeline`.

argparse, not a framework: it is in the standard library, starts in milliseconds, and the options
are made from `QuantizeConfig` (`options.py`), so a decorator-based library would have nothing left
to declare.
"""
