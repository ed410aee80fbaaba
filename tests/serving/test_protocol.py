"""Leases, limits and refusals, by the viewers' client and by requests of no client."""

import gc
import http.client
import json
import socket
import struct
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
from nnInteractive.inference.remote.remote_session import (
    ServerAtCapacityError,
    SessionExpiredError,
)

from medsam_jax.serving import packing
from medsam_jax.serving.guard import Guard
from medsam_jax.serving.leases import FullError, GoneError, Leases
from tests.serving.conftest import serving


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def lease(running):
    """A plain HTTP client with a lease on the running server."""
    with httpx.Client(base_url=running[0], timeout=60) as client:
        token = client.post("/claim").json()["lease_token"]
        client.headers["X-Lease-Token"] = token
        yield client
        client.post("/release")


def send_image(client, scan):
    meta = {"X-Meta": json.dumps({"image_properties": {}})}
    return client.post("/set_image", content=packing.pack(scan), headers=meta)


def test_capabilities_are_those_of_the_weights(connect):
    client = connect()
    assert client.ping()
    assert client.supported_interactions == {
        "points": True,
        "bbox2d": True,
        "bbox3d": False,
        "scribble": True,
        "lasso": True,
    }
    assert client.license == "Apache-2.0 (medsam_jax, tiny)"
    assert client.supports_undo
    assert client.supports_initial_label
    assert len(client.preferred_scribble_thickness) == 3
    assert set(client.channel_mapping) == {"points", "bbox2d", "scribble", "lasso"}


def test_weights_for_boxes_refuse_points(model, connect, scan, monkeypatch):
    monkeypatch.setattr(model, "takes_points", False)
    client = connect()
    assert not client.supported_interactions["points"]
    client.set_image(scan[None])
    client.set_target_buffer(np.zeros(scan.shape, np.uint8))
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        client.add_point_interaction([3, 9, 12], True)
    assert not client.undo()


def test_leases_end_by_idleness_and_silence():
    clock = Clock()
    leases = Leases(2, idle_seconds=100, liveness_seconds=30, clock=clock)
    idle, silent = leases.claim(), leases.claim()
    for clock.now in (20, 40, 60, 80, 100):
        leases.get(idle.token, is_action=False)
    assert leases.all() == [idle]
    with pytest.raises(GoneError):
        leases.get(silent.token)
    assert leases.remaining(idle) == 0
    leases.get(idle.token)
    assert leases.remaining(idle) == 100
    for clock.now in (120, 140, 160, 180, 200, 201):
        found = leases.all()
        assert found == [idle]
        if clock.now < 201:
            leases.get(idle.token, is_action=False)
    with pytest.raises(GoneError):
        leases.get(idle.token)


def test_a_full_server_takes_one_more_after_a_release():
    leases = Leases(1)
    first = leases.claim()
    with pytest.raises(FullError):
        leases.claim()
    assert leases.release(first.token)
    assert leases.claim().token != first.token


def test_the_longest_idle_makes_room_on_a_full_server():
    clock = Clock()
    leases = Leases(2, clock=clock, liveness_seconds=1000, yield_seconds=120)
    first, second = leases.claim(), leases.claim()
    clock.now = 60
    leases.get(first.token)
    clock.now = 120
    with pytest.raises(FullError):
        leases.claim()
    clock.now = 121
    third = leases.claim()
    assert {lease.token for lease in leases.all()} == {first.token, third.token}
    with pytest.raises(GoneError):
        leases.get(second.token)


# The client leaves its connection open when it is refused.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_the_client_is_told_of_a_full_server_and_of_a_lost_lease(model, scan):
    clock = Clock()
    leases = Leases(1, idle_seconds=100, liveness_seconds=1000, clock=clock)
    with serving(model, leases=leases) as (url, _), Client(url) as client:
        assert client.idle_timeout_seconds == 100
        with pytest.raises(ServerAtCapacityError):
            Client(url)
        gc.collect()
        clock.now = 60
        assert client.heartbeat() == 40
        assert client.lease_status() == {"remaining_seconds": 40, "idle_timeout_seconds": 100}
        client.set_image(scan[None])
        assert client.heartbeat() == 100
        clock.now = 161
        with pytest.raises(SessionExpiredError):
            client.undo()


def test_a_restart_ends_the_leases_before(model, scan):
    with serving(model) as (url, _):
        client = Client(url)
        token = client._lease_token
        client._stop_heartbeat.set()
    with serving(model) as (url, _):
        answer = httpx.post(f"{url}/undo", json={}, headers={"X-Lease-Token": token})
        assert answer.status_code == 410
    client.close()


@pytest.mark.parametrize(
    ("coordinates", "status"),
    [([3, 9, 12], 200), ([7, 9, 12], 400), ([3, -1, 12], 400), ([3, 9, 1e300], 400), ([3, 9], 400),
     (None, 400), (["a", 1, 2], 400)],
)  # fmt: skip
def test_points_off_the_volume(lease, scan, coordinates, status):
    assert send_image(lease, scan[None]).status_code == 200
    body = {"coordinates": coordinates, "include_interaction": True}
    answer = lease.post("/add_point_interaction", json=body)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["detail"].startswith("coordinates: ")
        assert lease.post("/undo", json={}).headers["X-Meta"].startswith('{"ran_prediction": false')


@pytest.mark.parametrize(
    "box",
    [[[0, 7], [3, 16], [4, 21]], [[3, 4], [16, 3], [4, 21]], [[9, 10], [3, 16], [4, 21]], [[3, 4]],
     "box", None, [[3, 4], [3, 16], [4, None]]],
)  # fmt: skip
def test_bad_boxes(lease, scan, box):
    send_image(lease, scan[None])
    body = {"bbox_coords": box, "include_interaction": True}
    answer = lease.post("/add_bbox_interaction", json=body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("bbox_coords: ")


def test_prompts_without_an_image(lease):
    body = {"bbox_coords": [[3, 4], [3, 16], [4, 21]], "include_interaction": True}
    answer = lease.post("/add_bbox_interaction", json=body)
    assert answer.status_code == 400
    assert answer.json() == {"detail": "no image is set; call set_image first"}


@pytest.mark.parametrize("body", [b"{", b"[]", b"1", b'{"a":' * 50000, b"\xff"])
def test_bodies_that_are_no_json_object(lease, body):
    answer = lease.post("/set_do_autozoom", content=body)
    assert answer.status_code == 400


def test_images_that_cannot_be_read(lease, scan):
    nan = scan[None].copy()
    nan[0, 0, 0, 0] = np.nan
    for image in (nan, scan, np.stack([scan, scan]), np.full((1, 2, 5, 5), 7.0, np.float32)):
        answer = send_image(lease, image)
        assert answer.status_code == 400
        assert "\n" not in answer.json()["detail"]
    assert lease.post("/undo", json={}).json()["detail"].startswith("no image is set")


def test_a_small_body_that_claims_much_is_refused_unread(lease):
    shape = struct.pack("<4q", 1, 10_000, 10_000, 1000)
    body = b"NNIA" + bytes([1, 1, 4, 5]) + b"uint8" + shape + struct.pack("<I", 1) + bytes(1000)
    assert lease.post("/set_image", content=body).status_code == 413
    assert lease.post("/set_image", content=bytes((1 << 20) + 1)).status_code == 413
    parts = (bytes(1 << 18) for _ in range(5))  # of unknown length
    assert lease.post("/set_image", content=parts).status_code == 413


def test_half_a_body_leaves_the_server_running(running, lease, scan):
    address = urlsplit(running[0])
    with socket.create_connection((address.hostname, address.port)) as connection:
        token = lease.headers["X-Lease-Token"]
        head = f"POST /set_image HTTP/1.1\r\nHost: localhost\r\nX-Lease-Token: {token}\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\nNNIA".encode())
    assert send_image(lease, scan[None]).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:9"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ],
)
def test_web_pages_elsewhere_cannot_talk_to_it(running, headers, status):
    address = urlsplit(running[0])
    connection = http.client.HTTPConnection(address.hostname, address.port)
    connection.request("GET", "/healthz", headers=headers)
    assert connection.getresponse().status == status
    connection.close()


def test_a_token_is_asked_for_on_every_route_but_healthz(model):
    with serving(model, guard=Guard("s3cret")) as (url, server):
        assert httpx.get(f"{url}/healthz").status_code == 200
        for route in server.app.routes:
            if route.path != "/healthz":
                method = next(iter(route.methods - {"HEAD"}))
                for given in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
                    assert httpx.request(method, url + route.path, headers=given).status_code == 401
        with Client(url, api_key="s3cret") as client:
            assert client.heartbeat() > 0


def test_a_failure_in_the_background_leaves_other_sessions_running(
    connect, running, scan, monkeypatch
):
    broken, whole = connect(), connect()
    for client in (broken, whole):
        client.set_image(scan[None])
        client.set_target_buffer(np.zeros(scan.shape, np.uint8))
    by_token = {lease.token: lease for lease in running[1].leases.all()}
    found = by_token[broken._lease_token]

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(found.volume, "encode_next", fail)
    broken.heartbeat()
    running[1].worker.submit(lambda: None).result()
    whole.add_bbox_interaction([[3, 4], [3, 16], [4, 21]], True)
    broken.add_bbox_interaction([[3, 4], [3, 16], [4, 21]], True)
    assert whole.target_buffer.any()
    np.testing.assert_array_equal(whole.target_buffer, broken.target_buffer)
    assert found.failed
