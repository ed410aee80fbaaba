"""Who may talk to the server, and how much may be sent."""

import dataclasses
import hmac
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from medsam_jax.errors import UserError
from medsam_jax.serving.packing import TooLargeError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclasses.dataclass(frozen=True)
class Guard:
    """Refuses requests without the token, and those that a web page elsewhere makes.

    Without a token the server is bound to loopback, and `Host` has to name loopback: a page whose
    own name was pointed to this machine names another host.
    """

    token: str | None = None

    def refuses(self, request: Request, needs_token: bool = True) -> tuple[int, str] | None:
        """Returns the status and one line for a request that is refused, else None."""
        host = _host(f"//{request.headers.get('host', '')}")
        if self.token is None and host not in LOOPBACK:
            return 403, f"Host: {host!r} is not this machine; start the server with --host"
        origin = request.headers.get("origin")
        if origin is not None and (origin == "null" or _netloc(origin) != request.headers["host"]):
            return 403, "Origin: requests of other web pages are refused"
        if self.token is None or not needs_token:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            return 401, "Authorization: give the server's --token as API key"
        return None


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Returns the body. Raises TooLargeError once it is longer, UserError if it is cut off."""
    claimed = request.headers.get("content-length", "0")
    if claimed.isdecimal() and int(claimed[:20]) > most_bytes:
        raise TooLargeError(f"body: {claimed[:20]} bytes; the limit is {most_bytes:,}")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most_bytes:
                raise TooLargeError(f"body: more than the limit of {most_bytes:,} bytes")
    except ClientDisconnect:
        raise UserError("body: cut off; send it again") from None
    return bytes(body)


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None
