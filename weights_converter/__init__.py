"""Checkpoints of the SAM family in and out: PyTorch `.pth`, safetensors, Orbax. Needs no torch.

`python -m weights_converter.convert --help` is the command line; `conversion.convert` the function.
"""
