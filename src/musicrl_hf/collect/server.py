"""The web server of the page: what it lets in, the clips, and the export for whoever runs it."""

import hmac
import ipaddress
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .export import export_votes
from .page import build_page, own_preview, page_head, page_theme
from .service import ListeningService
from .tokens import Refused

LOOPBACK = "127.0.0.1"
_OWN = ("/clip/", "/export", "/health")
_GRADIO = ("/config", "/assets/", "/static/", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json")
_GRADIO_API = ("theme.css", "component_server")
_ALLOWED = (*_OWN, *_GRADIO, *(f"/gradio_api/{name}" for name in _GRADIO_API))
_MOST_CONNECTIONS = 1000
_FOREIGN = "This page does not answer to this name: open it at its address, or start it with --hostnames NAME.\n"
_CROSS = "This page takes no requests from other sites: open it at its own address.\n"
_LONGEST_BODY = 32_768  # bytes; a vote has a few hundred
_HEADERS = {
    # Gradio builds its components from strings of code; everything else comes from this server or from nowhere.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_CLIP_HEADERS = {
    "cache-control": "private, no-store",
    # In the place of those that tell when a file was written: a pair's clips are written one after the other, in an order that
    # whoever runs the page knows.
    "last-modified": "Thu, 01 Jan 1970 00:00:00 GMT",
    "etag": '"clip"',
}


def build_app(service: ListeningService, names: Sequence[str] = ()) -> FastAPI:
    """The page, its clips, and `/export` for whoever holds the store's admin token.

    Args:
        service: answers the page.
        names: of this server, beside localhost and addresses.
    """
    app = FastAPI(title="musicrl collect", docs_url=None, redoc_url=None, openapi_url=None)
    exporting = threading.Lock()
    desk = service.desk

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/clip/{token}/{side}")
    def clip(token: str, side: str) -> FileResponse:
        try:
            path = desk.clip(token, side)
        except Refused as error:
            raise HTTPException(403, str(error)) from None
        except (ValueError, FileNotFoundError):
            raise HTTPException(404, "There is no such clip.") from None
        return FileResponse(path, media_type="audio/wav", headers=_CLIP_HEADERS)

    @app.get("/export")
    def export(authorization: str = Header(""), licence: str | None = None) -> StreamingResponse:
        expected = f"Bearer {desk.store.admin_token}"
        if not hmac.compare_digest(authorization.encode(), expected.encode()):
            raise HTTPException(
                401, "Send the admin token: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
            )
        if not exporting.acquire(blocking=False):
            raise HTTPException(429, "An export is being written: try again when it is done.")
        try:
            scratch = tempfile.TemporaryDirectory(prefix="musicrl-export-")
            archive = Path(scratch.name) / "votes.zip"
            try:
                result = export_votes(desk.store, Path(scratch.name) / "votes", licence=licence)
            except ValueError as error:
                raise HTTPException(409, str(error)) from None
            if result.path is None:
                raise HTTPException(404, "The store has no vote.")
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
                for path in sorted(path for path in result.path.rglob("*") if path.is_file()):
                    file.write(path, Path("votes") / path.relative_to(result.path))
        finally:
            exporting.release()
        headers = {"content-disposition": 'attachment; filename="votes.zip"', "cache-control": "no-store"}
        return StreamingResponse(_read_and_remove(archive, scratch), media_type="application/zip", headers=headers)

    gr.mount_gradio_app(
        app,
        build_page(service),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=page_theme(),
        head=page_head(),
    )
    app.add_middleware(OwnPreview, study=desk.rules.study)
    app.add_middleware(Gate, names=names)
    return app


class OwnPreview:
    """Puts the page's own title and link preview into the one document that Gradio writes."""

    def __init__(self, app: ASGIApp, study: bool):
        self.app, self.study = app, study

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        start: Message = {}
        parts: list[bytes] = []

        async def send_whole(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                page = own_preview(b"".join(parts).decode(), self.study).encode()
                kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
                await send({**start, "headers": [*kept, (b"content-length", str(len(page)).encode())]})
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, send_whole)


class Gate:
    """Lets in what the page needs and nothing else of Gradio: no uploads, no files, no proxy, no named endpoints.

    It answers to its own names alone. Otherwise a site elsewhere could have its name resolve to this machine (DNS
    rebinding), and a browser here would let it read the page as its own. An address cannot be rebound, and is let in.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] = ()):
        self.app = app
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope) if scope["type"] == "http" else {"host": "localhost"}
        if not self._is_own(headers.get("host", "")):
            return await PlainTextResponse(_FOREIGN, 403)(scope, receive, send)
        if not self._is_same_site(headers.get("origin"), headers.get("host", "")):
            return await PlainTextResponse(_CROSS, 403)(scope, receive, send)
        refusal = _refusal(scope)
        if refusal is not None:
            return await Response(status_code=refusal)(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _is_own(self, host: str) -> bool:
        """Whether a Host header, NAME[:PORT] or [IPv6][:PORT], names this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name.removesuffix(".") in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _is_same_site(self, origin: str | None, host: str) -> bool:
        """Whether a request comes from this page, as browsers say in Origin: another one's could act in a listener's name."""
        try:
            return origin is None or urlsplit(origin).netloc == host or urlsplit(origin).hostname in self.names
        except ValueError:
            return False


def _refusal(scope: Scope) -> int | None:
    """The status that refuses a request, or None."""
    path = scope["path"]
    if scope["type"] != "http" or not (path == "/" or path.startswith(_ALLOWED)) or ".." in path:
        return 404
    headers: Mapping[bytes, bytes] = dict(scope["headers"])
    if scope["method"] == "POST":
        length = headers.get(b"content-length", b"")
        # What comes in pieces has no length beforehand, and is read by its pieces whatever length it claims.
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411
        if int(length) > _LONGEST_BODY:
            return 413
    return None if scope["method"] in ("GET", "HEAD", "POST") else 405


def _read_and_remove(archive: Path, scratch: tempfile.TemporaryDirectory) -> Iterator[bytes]:
    with scratch, open(archive, "rb") as file:
        while block := file.read(2**20):
            yield block


def serve(
    service: ListeningService,
    host: str = LOOPBACK,
    port: int = 7860,
    names: Sequence[str] = (),
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve the page until it is interrupted. No access log is written: it would hold addresses.

    Args:
        service: answers the page.
        host: address to listen on; only with another one than loopback does anything leave this machine.
        port: 0 takes a free one.
        names: that this server is asked for by, beside `host`, localhost and addresses: its own, behind a web server.
        ready: is called with the page's address as soon as it can be opened.

    Raises:
        OSError: the port is taken, or the host is no address of this machine.
    """
    with listen(host, port) as listening:
        serve_on(listening, service, host, names, ready)


def serve_on(
    listening: socket.socket,
    service: ListeningService,
    host: str = LOOPBACK,
    names: Sequence[str] = (),
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """As `serve`, on a socket that `listen` has taken for `host` before."""
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listening.getsockname()[1]}/")
    uvicorn.Server(uvicorn_config(service, [host, *names])).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket for the page.

    Raises:
        OSError: the port is taken, or the host is no address of this machine.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise OSError(f"`host` and `port` are {host} and {port}: {error.strerror}; give others.") from error


def uvicorn_config(service: ListeningService, names: Sequence[str] = ()) -> uvicorn.Config:
    """How the page is served."""
    return uvicorn.Config(
        build_app(service, names),
        access_log=False,
        log_level="warning",
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
