"""A running server with a small model of random weights, and the viewers' client for it."""

import contextlib
import socket
import threading

import numpy as np
import pytest
import uvicorn
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.functional import flatten_state
from medsam_jax.serving.app import Server
from medsam_jax.serving.guard import Guard
from medsam_jax.serving.leases import Leases
from medsam_jax.serving.served_model import ServedModel
from tests.tiny import tiny_sam, update_state


@pytest.fixture(scope="session")
def model():
    sam = tiny_sam()
    bias = "mask_decoder.iou_prediction_head.layers.2.bias"  # scores that let propagation go on
    update_state(sam, {bias: np.full_like(flatten_state(sam)[bias][...], 0.9)})
    served = ServedModel(Predictor(sam), "tiny", "Apache-2.0", "MR")
    served.takes_points = True
    served.warm_up()
    return served


@contextlib.contextmanager
def serving(model, **options):
    """Yields the URL and the `Server` while it runs."""
    server = Server(model, **options)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(server.app, log_level="warning", lifespan="on", ws="none")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def running(model):
    with serving(model, guard=Guard(), leases=Leases(most=16), most_bytes=1 << 20) as found:
        yield found


@pytest.fixture
def connect(running):
    """Opens clients of the running server, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(nnInteractiveRemoteInferenceSession(running[0]))


@pytest.fixture
def scan():
    """A scan [Z, H, W] of three unequal sides with a bright ball."""
    z, y, x = np.ogrid[:7, :20, :26]
    inside = ((z - 3) / 3) ** 2 + ((y - 9) / 6) ** 2 + ((x - 12) / 8) ** 2 < 1
    noise = np.random.default_rng(0).normal(0, 20, inside.shape)
    return (100 + 150 * inside + noise).astype(np.float32)
