"""Converts checkpoints of the SAM family between PyTorch `.pth`, safetensors and Orbax.

torch is not needed. The command line is `python -m weights_converter.convert --help`; the function
is `convert.convert`.
"""
