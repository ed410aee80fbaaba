"""`medsam-jax COMMAND`: all commands under one name, from a clone or an installed wheel."""

import runpy
import sys

import medsam_jax

COMMANDS = {  # name: (module, summary)
    "manifest": ("medsam_jax.datasets.manifest", "write a manifest for folders of scans and masks"),
    "inspect": ("medsam_jax.datasets.inspect", "say how a scan is read, and draw it"),
    "build": ("medsam_jax.datasets.build", "build a data set from a manifest"),
    "train": ("medsam_jax.train", "fine-tune a model"),
    "report": ("medsam_jax.report", "write the report of a finished training run again"),
    "evaluate": ("medsam_jax.evaluate", "score checkpoints: tables and figures"),
    "predict": ("medsam_jax.predict", "segment pictures, slices and volumes"),
    "serve": ("medsam_jax.serve", "let napari and 3D Slicer prompt a model"),
    "export": ("medsam_jax.export", "write StableHLO programs that need no library"),
    "convert": ("weights_converter.convert", "convert checkpoints, or show what one holds"),
    "init": ("weights_converter.init", "write a checkpoint with random weights"),
}


def usage() -> str:
    """Returns the text of `medsam-jax --help`."""
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: medsam-jax COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "`medsam-jax COMMAND --help` explains a command's flags, `medsam-jax --version` prints",
            "the version. `python -m datasets.build` of the documentation is `medsam-jax build`,",
            "and so on; `train --config lite_medsam` names a config that comes with the package.",
        )
    )


def main() -> None:
    """Runs a command as `python -m MODULE` does: same flags, messages and exit status."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-help", "-h", "help"):
        print(usage())
    elif name in ("--version", "-version"):
        print(f"medsam_jax {medsam_jax.__version__}")
    elif name not in COMMANDS:
        print(f"error: {name!r} is no command; see medsam-jax --help", file=sys.stderr)
        sys.exit(1)
    else:
        sys.argv[1:] = arguments
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
