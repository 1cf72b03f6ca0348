"""The steps that a conversion is made of: each takes what one room made on to the next room.

`opening`, `rotating`, `quantizing`, `budgeting`, `fusing` (writes it, attention fused),
`outline` (what limits of targets look at), `packaging`, `checks` and `run_report`; `conversion`
passes their results on. `faq_onnx.pipeline` has the commands.
"""
