"""Opens a checkpoint file; its first bytes identify the format."""

from pathlib import Path

from medsam_jax.errors import UserError
from medsam_jax.io.safetensors import read_safetensors
from medsam_jax.io.tensors import TensorFile
from weights_converter.pth_reader import read_pth


def read_file(path: str) -> TensorFile:
    """Reads names, shapes and types of a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    Raises:
      UserError: the file does not exist or is not a readable checkpoint.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # safetensors: 8 bytes of header length, then JSON. For damaged files the suffix decides.
    if head[8:9] == b"{" or Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    return read_pth(path)
