"""The process that compiles for Qualcomm's NPU, or runs what was compiled in its simulator.

A process of its own: the libraries print to stdout, keep gigabytes, and crash on what they do not
like. Reads a request as JSON from stdin, and writes its answer as the last line of stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from faq_onnx.runtime.static_decoder import StaticDecoder

__all__ = ["main"]

PROVIDER = "QNNExecutionProvider"
ERRORS_ONLY = 3


def main() -> None:
    """Answer one request."""
    import onnxruntime_qnn  # noqa: PLC0415 - an extra

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    request = json.load(sys.stdin)
    answer = {"compile": _compile, "read": _read}[request["kind"]](request)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _compile(request: Mapping[str, Any]) -> dict[str, object]:
    """Compile graphs, several into one binary; what came out of each, by its name.

    Tokens of the request are read with what was compiled.
    """
    graphs, sessions = request["graphs"], []
    answer: dict[str, object] = {}
    for index, (name, graph) in enumerate(graphs.items()):
        config = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",  # the binary in a file of its own
            "ep.context_file_path": graph["context"],
            "session.record_ep_graph_assignment_info": "1",
        }
        if len(graphs) > 1:  # the last one writes the binary, under the name of the first
            config["ep.share_ep_contexts"] = "1"
            config["ep.stop_share_ep_contexts"] = str(int(index == len(graphs) - 1))
        start = time.perf_counter()
        session = _session(graph["model"], request["options"], config)
        sessions.append(session)
        answer[name] = {"nodes": _nodes(session), "seconds": time.perf_counter() - start}
    if request["tokens"]:
        _save_logits(StaticDecoder(*sessions), request)
    return answer


def _nodes(session: ort.InferenceSession) -> dict[str, int]:
    """Which provider took how many nodes."""
    nodes: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
    return nodes


def _read(request: Mapping[str, Any]) -> dict[str, object]:
    """Run compiled graphs over tokens; logits go to a file."""
    decoder = StaticDecoder(
        *(_session(request[name], request["options"], {}) for name in ("prefill", "decode"))
    )
    start = time.perf_counter()
    _save_logits(decoder, request)
    return {"seconds": time.perf_counter() - start}


def _save_logits(decoder: StaticDecoder, request: Mapping[str, Any]) -> None:
    tokens = np.asarray(request["tokens"], np.int64)
    logits = [decoder.read(part) for part in np.split(tokens, [len(tokens) - 1])]
    np.save(Path(request["logits"]), np.concatenate(logits))


def _session(
    model: str, provider_options: Mapping[str, str], config: Mapping[str, str]
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    options.add_provider_for_devices(devices, dict(provider_options))
    return ort.InferenceSession(model, options)


if __name__ == "__main__":
    main()
