"""Starts the server, and tests it by the viewers' own client."""

import dataclasses
import socket
import threading
import time

import numpy as np
import uvicorn

from medsam_jax.errors import UserError
from medsam_jax.serving.app import Server
from medsam_jax.serving.guard import Guard
from medsam_jax.serving.leases import Leases
from medsam_jax.serving.served_model import ServedModel


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `python -m medsam_jax.serve`."""

    checkpoint: str
    host: str | None = None  # None: loopback
    port: int = 1527
    token: str | None = None
    modality: str | None = None
    max_sessions: int = 8
    selftest: bool = False


def run(options: Options) -> None:
    """Serves until Ctrl-C, or until the self-test is done.

    Raises UserError for a checkpoint that takes no prompts, or an address that cannot be used.
    """
    with _listen(options) as listening:
        model = ServedModel.load(options.checkpoint, options.modality)
        print("compiling the usual prompts, unless their programs are kept", flush=True)
        model.warm_up()
        app = Server(model, Leases(options.max_sessions), Guard(options.token)).app
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        address, port = listening.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        print(f"serving {model.name} at {url}", flush=True)
        if not options.selftest:
            server.run(sockets=[listening])
            return
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            selftest(url, options.token)
        finally:
            server.should_exit = True
            thread.join()


def selftest(url: str, token: str | None) -> None:
    """Prompts a made-up scan through the client of the viewers, and prints the times.

    Raises UserError where the client is not installed, or a mask comes out wrong.
    """
    try:
        from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
    except ModuleNotFoundError:
        raise UserError(
            "--selftest: the client is not installed; pip install nninteractive-client"
        ) from None
    z, y, x = np.ogrid[:12, :128, :128]
    inside = ((z - 6) / 5) ** 2 + ((y - 60) / 24) ** 2 + ((x - 70) / 30) ** 2 < 1
    scan = np.where(inside, 100, -800).astype(np.int16)[None]
    mask, times = np.zeros(inside.shape, np.uint8), {}
    with Client(url, api_key=token) as client:
        for name, call in {
            "set_image": lambda: client.set_image(scan, {"spacing": (3.0, 1.0, 1.0)}),
            "set_target_buffer": lambda: client.set_target_buffer(mask),
            "first box, all slices": lambda: _box(client, 40, 100),
            "same box again": lambda: (client.undo(), _box(client, 40, 100)),
        }.items():
            start = time.perf_counter()
            call()
            times[name] = time.perf_counter() - start
        print(f"licence shown by the viewers: {client.license}")
    for name, seconds in times.items():
        print(f"{name:24} {seconds:7.3f} s")
    print(f"voxels found             {np.count_nonzero(mask):7} of {np.count_nonzero(inside)}")
    if not mask[6].any():
        raise UserError("--selftest: the mask on the prompted slice is empty")


def _box(client, x0: int, x1: int) -> None:
    client.add_bbox_interaction([[6, 7], [36, 85], [x0, x1 + 1]], True)


def _listen(options: Options) -> socket.socket:
    host = options.host or "127.0.0.1"
    try:
        family = socket.getaddrinfo(host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, options.port), family=family)
    except OSError as error:
        raise UserError(
            f"--host, --port: {host}:{options.port} cannot be used ({error.strerror}); choose "
            "another port"
        ) from None
