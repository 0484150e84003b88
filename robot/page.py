"""A page for a browser and its websocket, on one port: what the teleoperation pad and the operator's console share.

Only who knows the address with its token gets in: neither a stranger on the network nor another site's page in the same
browser (whose `Origin` is refused even with the token).
"""

import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Connection": "close",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    # Nothing comes from elsewhere, and nobody lays this page invisibly over another.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self' ws:; frame-ancestors 'none'",
}


class PageServer:
    """Serves `page` at `url` and hands each browser's socket to `talk`, in a thread of its own.

    `talk` may raise what a message that makes no sense raises: the socket is closed then. ValueError: port taken.
    """

    def __init__(self, name: str, page: str, talk: Callable[[ServerConnection], None], host: str, port: int):
        self._token = secrets.token_urlsafe(9)
        self._page, self._talk = page.encode(), talk
        options = {"process_request": self._answer, "max_size": 4096, "close_timeout": 1, "compression": None}
        try:
            self._server = serve(self._serve, host, port, **options)
        except OSError as error:
            raise ValueError(f"{name} at {host}:{port}: {error.strerror}; set host= or port=") from error
        self.url = f"http://{host}:{self._server.socket.getsockname()[1]}/?token={self._token}"
        self._thread = threading.Thread(target=self._server.serve_forever, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(timeout=2.0)

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page, or None: go on with a websocket."""
        parts = urlsplit(request.path)
        given = parse_qs(parts.query).get("token", [""])[0]
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return connection.respond(HTTPStatus.FORBIDDEN, "the address with its token is needed\n")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
            return connection.respond(HTTPStatus.FORBIDDEN, "another site's page\n")
        if parts.path == "/socket":
            return None
        if parts.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "there is one page only\n")
        return Response(200, "OK", Headers({**HEADERS, "Content-Length": str(len(self._page))}), self._page)

    def _serve(self, connection: ServerConnection) -> None:
        try:
            self._talk(connection)
        except (ConnectionClosed, ValueError, TypeError, KeyError):
            connection.close(1007, "not understood")
