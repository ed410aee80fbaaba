"""Converts SAM checkpoints between PyTorch `.pth`, safetensors and Orbax. Does not need torch.

Command line: `python -m weights_converter.convert --help`. Function: `convert.convert`.
"""
