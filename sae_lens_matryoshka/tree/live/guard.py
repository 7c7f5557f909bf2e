"""Who may talk to the server: this machine's browser, from the page itself, with the token.

Other pages that the browser has open can send requests to a server on loopback too. The Host header
stops those that give their own name this machine's address (DNS rebinding), the Origin and
Sec-Fetch-Site headers those from other sites and ports, and the token everything else.
"""

import hmac
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Guard:
    """ASGI middleware that answers 403 to whoever may not.

    Args:
        app: What the others reach.
        port: Where it is served.
        token: That a visitor has to bring: in the address at first, then in a cookie, or in a
            header `Authorization: token …`.
    """

    def __init__(self, app: ASGIApp, port: int, token: str):
        self._app, self._token = app, token
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._cookie = f"sae-tree-{port}"  # cookies are shared by all ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._refusal(scope) or self._welcome(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if headers.get("host") not in self._hosts:
            return refused(403, f"open this page as {min(self._hosts)}.")
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers['host']}":
            return refused(403, "another site's page may not use this server.")
        # absent where the visitor is no browser; "none" if an address was typed or clicked
        site = headers.get("sec-fetch-site", "none")
        is_visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("none", "same-origin") and not is_visit:
            return refused(403, "another site's page may not use this server.")
        if not any(self._fits(text) for text in self._tokens(scope, headers)):
            return refused(403, "open the address that the command printed: it has the token.")
        return None

    def _welcome(self, scope: Scope) -> Response | None:
        """To a visit with the token in the address: the page without it, and a cookie."""
        is_page = scope["method"] == "GET" and scope["path"] == "/"
        if not is_page or "token" not in QueryParams(scope["query_string"]):
            return None
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
        return response

    def _tokens(self, scope: Scope, headers: Headers) -> list[str]:
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            cookies.clear()
        own = cookies.get(self._cookie)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return [
            QueryParams(scope["query_string"]).get("token", ""),
            own.value if own else "",
            given if scheme.lower() == "token" else "",
        ]

    def _fits(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token.encode())


def refused(status: int, message: str) -> JSONResponse:
    """The answer to what is not accepted: one sentence."""
    return JSONResponse({"error": message}, status)
