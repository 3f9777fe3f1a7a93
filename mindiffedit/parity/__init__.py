"""Parity with the PyTorch reference, stage by stage: record its tensors once, compare with them anywhere.

`metrics` compares, `tolerances` says how much may differ and why, `golden` is the file in between and
`report` shows the result. These four are NumPy, Pillow and safetensors alone: a recording can be read and
compared where neither framework is installed.
"""
