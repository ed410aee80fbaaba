"""Routes of the nnInteractive remote protocol, as an ASGI application.

Requests are read and checked here; `Worker` runs what needs the model. Longer uploads are unpacked
in threads, so that heartbeats are answered meanwhile.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medsam_jax.errors import UserError
from medsam_jax.serving import interactions, packing
from medsam_jax.serving.guard import Guard, read_body
from medsam_jax.serving.leases import FullError, GoneError, Lease, Leases
from medsam_jax.serving.served_model import ServedModel
from medsam_jax.serving.volume_session import VolumeSession
from medsam_jax.serving.worker import Worker

log = logging.getLogger(__name__)

_MOST_JSON = 1 << 20  # bytes
_STATUS = {packing.TooLargeError: 413, GoneError: 410, FullError: 503}


class Server:
    """Answers the protocol for one model.

    Longer than other classes here: it has a method for each route.

    Args:
      most_bytes: of an upload, and of an array when unpacked.
    """

    def __init__(
        self,
        model: ServedModel,
        leases: Leases | None = None,
        guard: Guard | None = None,
        most_bytes: int = 2 << 30,
    ):
        self.model, self.leases = model, leases or Leases()
        self.most_bytes = most_bytes
        self.worker = Worker(self._encode_one)
        guard = guard or Guard()
        answers: dict[str, tuple[str, Callable]] = {
            "/claim": ("POST", self.claim),
            "/capabilities": ("GET", self.capabilities),
            "/set_image": ("POST", self.set_image),
            "/set_target_buffer": ("POST", self.set_target_buffer),
            "/set_do_autozoom": ("POST", self.set_do_autozoom),
            "/add_bbox_interaction": ("POST", self.add_bbox),
            "/add_point_interaction": ("POST", self.add_point),
            "/add_scribble_interaction": ("POST", self.add_scribble),
            "/add_lasso_interaction": ("POST", self.add_lasso),
            "/add_initial_seg_interaction": ("POST", self.add_initial_seg),
            "/predict": ("POST", self.predict),
            "/undo": ("POST", self.undo),
            "/reset_interactions": ("POST", self.reset_interactions),
            "/heartbeat": ("POST", self.heartbeat),
            "/lease_status": ("GET", self.lease_status),
            "/release": ("POST", self.release),
            "/healthz": ("GET", self.healthz),
        }
        routes = [
            Route(path, _guarded(guard, path != "/healthz", answer), methods=[method])
            for path, (method, answer) in answers.items()
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.worker.stop)

    def _encode_one(self) -> bool:
        """Encodes a slice of the session used last that has one left; False where none has."""
        self.leases.expire()
        for lease in self.leases.all():
            try:
                if lease.volume and not lease.failed and lease.volume.encode_next():
                    return True
            except Exception:  # of this session's volume; the others go on
                lease.failed = True
                log.exception("a slice could not be encoded in the background")
        return False

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def claim(self, request: Request) -> Response:
        lease = self.leases.claim()
        times = {
            "idle_timeout_seconds": self.leases.idle_seconds,
            "liveness_timeout_seconds": self.leases.liveness_seconds,
        }
        return JSONResponse({"lease_token": lease.token, "max_sessions": self.leases.most} | times)

    async def capabilities(self, request: Request) -> Response:
        self._lease(request)
        return JSONResponse(self.model.capabilities())

    async def set_image(self, request: Request) -> Response:
        lease = self._lease(request)
        array, meta = await self._array(request)
        if array.ndim != 4 or len(array) not in (1, 3):
            raise UserError(f"image: shape {list(array.shape)}; give [C, X, Y, Z], C 1 or 3")
        properties = meta.get("image_properties")
        spacing = _spacing(properties.get("spacing") if isinstance(properties, dict) else None)
        if array.dtype.kind == "b":
            array = array.astype(np.uint8)
        moved = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
        lease.volume = lease.sent = None
        lease.volume = await self._run(lambda: self.model.open(moved, spacing))
        lease.failed = False
        lease.sent = np.zeros(lease.volume.shape, bool)
        return JSONResponse({"original_image_shape": list(array.shape)})

    async def set_target_buffer(self, request: Request) -> Response:
        lease, fields = self._lease(request), await self._json(request)
        volume = _volume(lease)
        if fields.get("shape") != list(volume.shape):
            raise UserError(
                f"shape: {str(fields.get('shape'))[:80]}; the image has {list(volume.shape)}"
            )
        lease.buffer_type = packing.array_type(str(fields.get("dtype")))
        lease.sent = np.zeros(volume.shape, bool)
        return JSONResponse({})

    async def set_do_autozoom(self, request: Request) -> Response:
        lease, fields = self._lease(request), await self._json(request)
        _volume(lease).follow = bool(fields.get("do_autozoom", True))
        return JSONResponse({})

    async def add_bbox(self, request: Request) -> Response:
        return await self._add_place(request, interactions.read_box, "bbox_coords")

    async def add_point(self, request: Request) -> Response:
        return await self._add_place(request, interactions.read_point, "coordinates")

    async def _add_place(self, request: Request, read: Callable, name: str) -> Response:
        lease, fields = self._lease(request), await self._json(request)
        volume = _volume(lease)
        given = read(fields.get(name), _include(fields), volume.shape, volume.axis)
        return await self._add(lease, fields, given)

    async def add_scribble(self, request: Request) -> Response:
        return await self._add_stroke(request, is_lasso=False)

    async def add_lasso(self, request: Request) -> Response:
        return await self._add_stroke(request, is_lasso=True)

    async def _add_stroke(self, request: Request, is_lasso: bool) -> Response:
        lease = self._lease(request)
        volume = _volume(lease)
        drawn, fields = await self._array(request)
        given = interactions.read_stroke(
            drawn,
            fields.get("interaction_bbox"),
            _include(fields),
            volume.shape,
            volume.axis,
            is_lasso,
        )
        return await self._add(lease, fields, given)

    async def _add(
        self, lease: Lease, fields: dict[str, Any], given: interactions.Interaction
    ) -> Response:
        volume = _volume(lease)
        run = fields.get("run_prediction") is not False

        def add() -> bool:
            volume.prompt(given, run)
            return run

        return await self._answer(lease, add)

    async def add_initial_seg(self, request: Request) -> Response:
        lease = self._lease(request)
        volume = _volume(lease)
        mask, fields = await self._array(request)

        def add() -> bool:
            volume.set_initial(mask)
            lease.sent = volume.mask  # the client has written it into its buffer
            return bool(fields.get("run_prediction")) and volume.predict()

        return await self._answer(lease, add)

    async def predict(self, request: Request) -> Response:
        lease = self._lease(request)
        return await self._answer(lease, _volume(lease).predict)

    async def undo(self, request: Request) -> Response:
        lease = self._lease(request)
        return await self._answer(lease, _volume(lease).undo)

    async def reset_interactions(self, request: Request) -> Response:
        lease = self._lease(request)
        if lease.volume is not None:
            volume = lease.volume

            def reset() -> None:
                volume.reset()
                lease.sent = volume.mask

            await self._run(reset)
        return JSONResponse({})

    async def heartbeat(self, request: Request) -> Response:
        return self._status(self._lease(request, is_action=False))

    async def lease_status(self, request: Request) -> Response:
        return self._status(self._lease(request, is_action=False))

    async def release(self, request: Request) -> Response:
        released = self.leases.release(request.headers.get("x-lease-token"))
        return JSONResponse({"released": released})

    def _status(self, lease: Lease) -> Response:
        remaining = self.leases.remaining(lease)
        times = {"idle_timeout_seconds": self.leases.idle_seconds}
        return JSONResponse({"remaining_seconds": remaining} | times)

    def _lease(self, request: Request, is_action: bool = True) -> Lease:
        return self.leases.get(request.headers.get("x-lease-token"), is_action)

    async def _run(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self.worker.submit(function))

    async def _answer(self, lease: Lease, function: Callable[[], bool]) -> Response:
        """Runs what may change the mask, and answers with the part that has changed."""

        def changed() -> tuple[bool, list[list[int]] | None, np.ndarray | None]:
            volume = _volume(lease)
            if not function():
                return False, None, None
            box = _extent(volume.mask != lease.sent)
            lease.sent = volume.mask
            part = volume.mask[tuple(slice(*side) for side in box)] if box else None
            return True, box, part

        ran, box, part = await self._run(changed)
        meta: dict[str, Any] = {"ran_prediction": ran, "bbox": box}
        body = b""
        if part is not None:
            part = part.astype(lease.buffer_type)
            meta |= {"dtype": part.dtype.name, "shape": list(part.shape)}
            body = await run_in_threadpool(packing.pack, part)
        headers = {"X-Meta": json.dumps(meta)}
        return Response(body, headers=headers, media_type="application/octet-stream")

    async def _json(self, request: Request) -> dict[str, Any]:
        return _fields("body", await read_body(request, _MOST_JSON))

    async def _array(self, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
        """The packed array of the body, and the fields of X-Meta."""
        meta = _fields("X-Meta", request.headers.get("x-meta", "{}"))
        body = await read_body(request, self.most_bytes)
        return await run_in_threadpool(packing.unpack, body, self.most_bytes), meta


def _guarded(guard: Guard, needs_token: bool, answer: Callable) -> Callable:
    """Returns the route's function; errors of the user become one line and their status."""

    async def route(request: Request) -> Response:
        try:
            if refusal := guard.refuses(request, needs_token):
                status, detail = refusal
                return JSONResponse({"detail": detail}, status)
            return await answer(request)
        except UserError as error:
            return JSONResponse({"detail": str(error)}, _STATUS.get(type(error), 400))

    return route


def _fields(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is no JSON object; give one")
    return fields


def _include(fields: dict[str, Any]) -> bool:
    include = fields.get("include_interaction")
    if not isinstance(include, bool):
        raise UserError(f"include_interaction: {str(include)[:80]}; give true or false")
    return include


def _volume(lease: Lease) -> VolumeSession:
    if lease.volume is None:
        raise UserError("no image is set; call set_image first")
    return lease.volume


def _spacing(given: Any) -> tuple[float, float, float]:
    """Three numbers as given; cubes where none are, and for pictures the two of their sides."""
    if given is None or given == []:
        return 1.0, 1.0, 1.0
    try:
        spacing = [float(value) for value in given]
    except (TypeError, ValueError):
        spacing = []
    spacing = [1.0, *spacing] if len(spacing) == 2 else spacing
    if len(spacing) != 3 or not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise UserError(f"spacing: {str(given)[:80]}; give three positive numbers")
    return tuple(spacing)


def _extent(changed: np.ndarray) -> list[list[int]] | None:
    """The half-open box of what is True; None where nothing is."""
    box = []
    for axis in range(3):
        rest = tuple(other for other in range(3) if other != axis)
        found = np.flatnonzero(changed.any(axis=rest))
        if not len(found):
            return None
        box.append([int(found[0]), int(found[-1]) + 1])
    return box
