"""Server for napari and 3D Slicer: their nnInteractive extensions prompt a model of this library.

Examples:
  python -m medsam_jax.serve --checkpoint lite_medsam --modality CT
  python -m medsam_jax.serve --checkpoint runs/liver/best --host 0.0.0.0 --token SECRET
  python -m medsam_jax.serve --checkpoint lite_medsam --selftest

Needs the extra: pip install "medsam-jax[serve]". docs/viewers.md says how the viewers connect.
Without --host only programs on this machine can connect. Ctrl-C ends the server.
"""

import os

from absl import flags, logging

from medsam_jax import cli, errors
from medsam_jax.io.files import keep_compiled_programs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Checkpoint directory or name of known weights.", required=True
)
_PORT = flags.DEFINE_integer("port", 1527, "Port to listen on; 0 takes a free one.", 0, 65535)
_HOST = flags.DEFINE_string(
    "host", None, "Address to listen on for other machines, with --token; by default this one only."
)
_TOKEN = flags.DEFINE_string(
    "token",
    None,
    "Secret that clients give as API key; better in the variable MEDSAM_JAX_TOKEN, as other users "
    "of the machine can read command lines.",
)
_MODALITY = flags.DEFINE_string(
    "modality", None, "CT means Hounsfield units; else MR, US, ... By default guessed by values."
)
_SESSIONS = flags.DEFINE_integer("max_sessions", 8, "Users at a time.", 1)
_SELFTEST = flags.DEFINE_bool("selftest", False, "Start, prompt once by the client, and stop.")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    token = _TOKEN.value or os.environ.get("MEDSAM_JAX_TOKEN") or None
    if _HOST.value is not None and token is None:
        raise errors.UserError(
            f"--host: {_HOST.value} lets other machines connect; give a --token too"
        )
    keep_compiled_programs()
    from medsam_jax.inference.request import check_modality

    check_modality("--modality:", _MODALITY.value)
    try:
        from medsam_jax.serving import serve
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f'{error.name}: not installed; pip install "medsam-jax[serve]"'
        ) from None
    serve.run(
        serve.Options(
            checkpoint=_CHECKPOINT.value,
            host=_HOST.value,
            port=_PORT.value,
            token=token,
            modality=_MODALITY.value,
            max_sessions=_SESSIONS.value,
            selftest=_SELFTEST.value,
        )
    )


if __name__ == "__main__":
    cli.run(main)
