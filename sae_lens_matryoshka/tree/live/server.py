"""The server of a tree's page: texts, steering and labels, on loopback alone.

    GET  /             the page, with `live.js`
    GET  /data/…       its files
    GET  /live/state   labels and limits
    POST /live/text    {"text"}: its tokens' latents, as `data/text-N.js` has them
    POST /live/steer   {"prompt", "mode", "changes", "new_tokens", "seed"}: three texts
    POST /live/label   {"latent", "label"}

Answers other than 200 are {"error": one sentence}. The model answers one request at a time.
"""

import asyncio
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from sae_lens import SAE
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sae_lens_matryoshka.levels.stats import token_ids
from sae_lens_matryoshka.steering.generation import compare, prompt_tokens
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import as_inference, fingerprint
from sae_lens_matryoshka.tree.live.guard import Guard, refused
from sae_lens_matryoshka.tree.live.requests import (
    LABEL_LENGTH,
    NEW_TOKENS,
    TEXT_LENGTH,
    count_in,
    json_of,
    latents_in,
    text_in,
)
from sae_lens_matryoshka.tree.page.labels import read_labels
from sae_lens_matryoshka.tree.page.texts import text_for_page
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.files import atomic_file

_LABELS = "labels.json"
_SECONDS = 120  # that an answer of the model may take
_SCRIPT = Path(__file__).with_name("live.js")


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; OSError if the port is in use."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(f"--port {port} can't be used ({reason}): give another.") from error


def check_page(folder: Path) -> None:
    """Check that a page was written in a folder; ValueError if it was not."""
    if not (folder / "index.html").is_file() or not (folder / "data").is_dir():
        raise ValueError(f"{folder} has no page with its data/: give --dataset to write one.")


class Live:
    """A written page with the model that its tree is of.

    Args:
        folder: What `write_page` wrote, and the tree and `gathered` beside it.
        sae: The SAE.
        model: Its model.
        name: What the SAE is called.

    Raises:
        ValueError: the folder has no page, or one of another SAE, or the model has no tokenizer.
    """

    def __init__(self, folder: Path, sae: SAE[Any], model: Any, name: str):
        check_page(folder)
        self._sae, self._model, self._tree = sae, model, Tree.load(folder / "tree.json")
        weights = self._tree.settings["source"]["weights"]
        if weights != fingerprint(sae):
            raise ValueError(f"{folder} has the page of another SAE: give another folder.")
        if getattr(model, "tokenizer", None) is None:
            raise ValueError("the model has no tokenizer, so it can't read a text.")
        self._sae = as_inference(sae)
        gathered = Gathered(folder / "gathered")
        self._mean = torch.from_numpy(gathered.sums["total"] / gathered.n_tokens).float()
        self._text_of = TokenTexts(model.tokenizer)
        self._about = {"format_version": 1, "sae": name, "weights": weights}
        self._labels: dict[int, str] = {}
        if (folder / _LABELS).exists():
            self._labels = read_labels(folder / _LABELS, sae.cfg.d_sae, weights)
        self._folder, self._busy = folder, threading.Lock()
        self.is_stopping: Callable[[], bool] = lambda: False  # whether the server is

    def app(self) -> Starlette:
        """The application, without a guard."""
        get, post = ["GET"], ["POST"]
        return Starlette(
            routes=[
                Route("/", self._page, methods=get),
                Route("/live.js", lambda request: FileResponse(_SCRIPT), methods=get),
                Route("/live/state", self._state, methods=get),
                Route("/live/text", self._read, methods=post),
                Route("/live/steer", self._steer, methods=post),
                Route("/live/label", self._label, methods=post),
                Mount("/data", StaticFiles(directory=self._folder / "data")),
            ],
            exception_handlers={
                HTTPException: _refused,
                ValueError: lambda _, error: refused(400, str(error)),
                TimeoutError: lambda _, error: refused(503, str(error)),
                OSError: lambda _, error: refused(500, str(error)),
                ClientDisconnect: lambda _, error: Response(),  # which nobody reads
            },
        )

    def _page(self, request: Request) -> Response:
        page = (self._folder / "index.html").read_text(encoding="utf-8")
        before, end, _ = page.rpartition("</html>")
        return HTMLResponse(f'{before}<script src="live.js"></script>\n{end}')

    def _state(self, request: Request) -> Response:
        limits = {"text": TEXT_LENGTH, "new_tokens": NEW_TOKENS, "label": LABEL_LENGTH}
        return JSONResponse({"labels": self._labels, "limits": limits})

    async def _label(self, request: Request) -> Response:
        values = await json_of(request)
        latent = count_in(values, "latent", 0, self._sae.cfg.d_sae - 1)
        label = text_in(values, "label", LABEL_LENGTH).strip()
        changed = {**self._labels, latent: label}
        changed = {number: text for number, text in sorted(changed.items()) if text}
        with atomic_file(self._folder / _LABELS) as unfinished:  # as the page exports it
            text = json.dumps({**self._about, "labels": changed}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
        self._labels = changed
        return JSONResponse({})

    async def _read(self, request: Request) -> Response:
        text = text_in(await json_of(request), "text")
        return await self._in_turn(request, lambda check: self._latents_of(text))

    def _latents_of(self, text: str) -> dict[str, Any]:
        sae, model, metadata = self._sae, self._model, self._sae.cfg.metadata
        ids = prompt_tokens(model, sae, text)[0].cpu()
        is_run = ~torch.isin(ids, token_ids(metadata.exclude_special_tokens, model))
        trained = torch.zeros_like(is_run)
        trained[slice(*(metadata.seqpos_slice or (None,)))] = True
        is_run &= trained
        if not is_run.any():
            raise ValueError("the text is too short: it has no tokens that the SAE is run on.")
        widths = self._tree.settings["sae"]["widths"]
        ids = ids.numpy().astype(np.int32)
        return text_for_page(sae, model, ids, is_run.numpy(), self._mean, widths, self._text_of)

    async def _steer(self, request: Request) -> Response:
        values = await json_of(request)
        prompt = text_in(values, "prompt")
        latents, mode = latents_in(values, self._sae, self._tree)
        n, seed = count_in(values, "new_tokens", 1, NEW_TOKENS), count_in(values, "seed", 0, 2**31)

        def work(check: Callable[[], None]) -> dict[str, Any]:
            texts = compare(
                self._model,
                self._sae,
                prompt,
                latents,
                mode,
                max_new_tokens=n,
                seed=seed,
                on_token=check,
            )
            return texts._asdict()

        return await self._in_turn(request, work)

    async def _in_turn(
        self, request: Request, work: Callable[[Callable[[], None]], dict[str, Any]]
    ) -> Response:
        """The answer of `work`, which runs in a thread and calls what it is given now and then."""
        if not self._busy.acquire(blocking=False):
            return refused(503, "the model is busy: wait for its other answer, and try again.")
        has_left, deadline = threading.Event(), time.monotonic() + _SECONDS

        def check() -> None:
            if has_left.is_set() or self.is_stopping():
                raise TimeoutError("the server ends." if self.is_stopping() else "nobody waits.")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took over {_SECONDS} seconds: ask for fewer tokens.")

        def run() -> dict[str, Any]:
            try:
                return work(check)
            finally:
                self._busy.release()

        task = asyncio.ensure_future(run_in_threadpool(run))
        while not task.done():
            await asyncio.wait({task}, timeout=0.5)
            if await request.is_disconnected():
                has_left.set()
        return JSONResponse(task.result())


def _refused(request: Request, error: Any) -> Response:
    return refused(error.status_code, error.detail)


def serve(live: Live, listening: socket.socket) -> None:
    """Print the address, and serve until SIGINT or SIGTERM."""
    port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
    config = uvicorn.Config(
        Guard(live.app(), port, token),
        log_level="warning",
        access_log=False,
        http="h11",
        ws="none",
        lifespan="off",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    live.is_stopping = lambda: server.should_exit
    print(f"\nOpen http://127.0.0.1:{port}/?token={token}\nCtrl-C ends it.", flush=True)
    server.run([listening])
