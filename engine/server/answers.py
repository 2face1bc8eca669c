"""Answers that carry no object: refusals, and what is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from coffret.connectors.httpwire import ERROR_HEADER, TOKEN, TRIES

if TYPE_CHECKING:
    from coffret.connectors.httpwire import Refusal

_SERVER = {"Server": "coffret"}
_MAX_MESSAGE = 2000


class Refused(Exception):
    """The request is refused; the message is for whoever made it. `close`: and the connection with it."""

    def __init__(self, refusal: Refusal, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.refusal, self.close = refusal, close


class ClientGone(ConnectionError):
    """The client has closed the connection, or is too slow: nobody is left to be answered."""


def refusal_response(refusal: Refusal, message: str, *, close: bool = False) -> web.Response:
    """A refusal: status, the word for the client, and a line of text."""
    headers = {**_SERVER, ERROR_HEADER: refusal.word}
    if refusal == TOKEN:
        headers["WWW-Authenticate"] = 'Bearer realm="coffret"'
    elif refusal == TRIES or refusal.status == 503:
        headers["Retry-After"] = "10"
    text = " ".join(message.encode("utf-8", "backslashreplace").decode().split())[:_MAX_MESSAGE]
    response = web.Response(status=refusal.status, text=f"{text}\n", headers=headers)
    if close:
        response.force_close()
    return response


def done_response() -> web.Response:
    """It is done, and there is nothing more to say."""
    return web.Response(status=204, headers=_SERVER)


def stream_response(status: int, content_type: str, **headers: str) -> web.StreamResponse:
    """An answer whose body follows."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.StreamResponse(status=status, headers={**_SERVER, "Content-Type": content_type, **named})
