"""Who may use the server: checks of every request before it reaches the application, and headers of every answer.

Without a token only this machine may ask, by one of its own names: a page of the internet whose name leads to 127.0.0.1
(DNS rebinding) has another Host. A change needs the server's own Origin, if there is one. No other origin may read an
answer.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "atr_scale_token"
SAFE = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, reached from nowhere else."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware. token: what a request must bring, None if none is needed."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # there are no websockets
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return _refuse(421, f"this server answers to 127.0.0.1 and localhost, not to {host!r}")
        if self.token is not None and not self._has_token(headers):
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            if scope["method"] in SAFE and any(name == "token" and self._is_token(given) for name, given in query):
                return self._remember(scope, [(name, value) for name, value in query if name != "token"])
            return _refuse(401, "a token is needed: open the address that `atr-scale serve` has printed")
        origin = headers.get("origin")
        if scope["method"] not in SAFE and origin is not None and urlsplit(origin).netloc != host:
            return _refuse(403, "requests of other pages are refused")
        return None

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    def _remember(self, scope: Scope, query: list[tuple[str, str]]) -> Response:
        """The token as a cookie, and the same address without it, which may then be in the history."""
        answer = RedirectResponse(f"/?{urlencode(query)}" if query else "/", 303)
        secure = scope.get("scheme") == "https"
        answer.set_cookie(COOKIE, self.token or "", httponly=True, samesite="strict", secure=secure)
        return answer


def _refuse(status: int, reason: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"detail": reason}, status, headers)
