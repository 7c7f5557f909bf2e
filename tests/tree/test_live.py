"""The server of the page, as a process: who may ask, what it answers, and how it ends."""

import http.client
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import expect

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.steering import compare
from sae_lens_matryoshka.tree import Tree
from tests.tree.browser import open_browser
from tests.tree.live_world import model, sae, start, write
from tests.tree.worlds import CHILD, GRANDCHILD

STEER = {
    "prompt": "w3 w4",
    "mode": "add",
    "changes": [{"what": "latent", "latent": CHILD, "value": 9.0}],
    "new_tokens": 6,
    "seed": 0,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as own:
        return own.getsockname()[1]


class Server(NamedTuple):
    folder: Path
    port: int
    token: str
    process: Any

    def ask(
        self, path: str, values: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, str, http.client.HTTPResponse]:
        """Status, body and response of a request that brings the token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = values if isinstance(values, bytes | None) else json.dumps(values).encode()
        given = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        method = method or ("GET" if values is None else "POST")
        connection.request(method, path, body, {k: v for k, v in given.items() if v})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text, response

    def error(self, path: str, values: Any = None, **options: Any) -> tuple[int, str]:
        status, text, _ = self.ask(path, values, **options)
        return status, json.loads(text)["error"]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    write(folder)
    port = free_port()
    process, token = start(folder, port)
    yield Server(folder, port, token, process)
    process.terminate()
    process.wait(30)


def test_the_page_is_that_of_the_disk_with_one_script_more(server):
    status, text, response = server.ask("/")
    assert status == 200
    written = (server.folder / "page" / "index.html").read_text()
    assert text.replace('<script src="live.js"></script>\n', "") == written.rstrip("\n")
    assert "live.js" not in written
    assert not (server.folder / "page" / "data" / "live.js").exists()
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    status, text, _ = server.ask("/data/index.js")
    assert status == 200
    assert text == (server.folder / "page" / "data" / "index.js").read_text()


def test_the_token_becomes_a_cookie(server):
    status, _, response = server.ask(f"/?token={server.token}", Authorization="")
    assert (status, response.headers["Location"]) == (303, "/")
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    status, _, _ = server.ask("/", Authorization="", Cookie=cookie.partition(";")[0])
    assert status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"},
        {"Authorization": ""},
        {"Authorization": "token x"},
        {"Authorization": "", "Cookie": "a=b; ;;=\x01"},
    ],
    ids=str,
)
def test_who_is_refused(server, headers):
    for path, values in (("/data/index.js", None), ("/live/state", None), ("/live/steer", STEER)):
        status, error = server.error(path, values, **headers)
        assert status == 403
        assert error.endswith(".")
        assert server.token not in error


def test_the_page_itself_may(server):
    own = {"Origin": f"http://localhost:{server.port}", "Host": f"localhost:{server.port}"}
    assert server.ask("/live/state", Sec_Fetch_Site="same-origin", **own)[0] == 200
    visit = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}  # a link to it
    assert server.ask("/", **visit)[0] == 200
    assert server.ask("/live/steer", STEER, **visit)[0] == 403


def test_steering_is_that_of_python(server):
    status, text, _ = server.ask("/live/steer", STEER)
    assert status == 200
    own, expected = model(), {CHILD: 9.0}
    assert (
        json.loads(text)
        == compare(own, sae(), "w3 w4", expected, max_new_tokens=6, seed=0)._asdict()
    )
    family = {**STEER, "mode": "set", "changes": [{"what": "family", "latent": CHILD, "value": 9}]}
    status, text, _ = server.ask("/live/steer", family)
    assert Tree.load(server.folder / "page" / "tree.json").children(CHILD) == [GRANDCHILD]
    expected = {CHILD: 9.0, GRANDCHILD: 9.0}
    expected = compare(own, sae(), "w3 w4", expected, "set", max_new_tokens=6)
    assert json.loads(text) == expected._asdict()
    level = {**STEER, "mode": "ablate", "changes": [{"what": "level", "latent": CHILD}]}
    status, text, _ = server.ask("/live/steer", level)
    expected = compare(own, sae(), "w3 w4", range(2), "ablate", max_new_tokens=6)
    assert json.loads(text) == expected._asdict()


def test_a_text_is_read_by_level(server):
    status, text, _ = server.ask("/live/text", {"text": "w3 w4 w5"})
    values = json.loads(text)
    assert status == 200
    assert len(values["tokens"]) == 4
    assert values["latents"][0] is None  # BOS, which the SAE was not trained on
    own = model()
    _, cache = own.run_with_cache(own.tokenizer("<s> w3 w4 w5", return_tensors="pt").input_ids)
    acts = sae().encode(cache["blocks.1.hook_resid_pre"])[0]
    for flat, row in zip(values["latents"][1:], acts[1:].tolist(), strict=True):
        found = dict(zip(flat[::2], flat[1::2], strict=True))
        assert found == pytest.approx({i: a for i, a in enumerate(row) if a > 0}, rel=1e-2)
    assert any(values["latents"][1:])
    assert len(values["total"]) == 3


def test_labels_are_kept_beside_the_page(server):
    path = server.folder / "page" / "labels.json"
    assert server.ask("/live/label", {"latent": 3, "label": "  odd <b>\u2028🦊 \ud800"})[0] == 200
    assert server.ask("/live/label", {"latent": 1, "label": "gone"})[0] == 200
    assert server.ask("/live/label", {"latent": 1, "label": " "})[0] == 200
    assert json.loads(path.read_text())["labels"] == {"3": "odd <b>\u2028🦊 ?"}
    state = json.loads(server.ask("/live/state")[1])
    assert state["labels"] == {"3": "odd <b>\u2028🦊 ?"}
    server.ask("/live/label", {"latent": 3, "label": ""})


@pytest.mark.parametrize(
    ("path", "values", "status", "message"),
    [
        ("/live/steer", {**STEER, "mode": "x"}, 400, "mode='x' is not accepted"),
        ("/live/steer", {**STEER, "changes": []}, 400, "at least one change"),
        ("/live/steer", {**STEER, "changes": [3]}, 400, "must say what"),
        ("/live/steer", {**STEER, "changes": [{"what": ["latent"]}]}, 400, "must say what"),
        (
            "/live/steer",
            {**STEER, "changes": [{"what": "latent", "latent": 8, "value": 1}]},
            400,
            "latent=8 is not accepted: give 0 to 7",
        ),
        (
            "/live/steer",
            {**STEER, "changes": [{"what": "latent", "latent": 1}]},
            400,
            "value of latent 1=None",
        ),
        ("/live/steer", {**STEER, "new_tokens": 101}, 400, "new_tokens=101"),
        ("/live/steer", {**STEER, "new_tokens": True}, 400, "new_tokens=True"),
        ("/live/steer", {**STEER, "seed": -1}, 400, "seed=-1"),
        ("/live/steer", {**STEER, "prompt": "w1 " * 667}, 400, "at most 2000 characters"),
        ("/live/steer", {**STEER, "prompt": "w1 " * 130}, 400, "context of 128"),
        ("/live/steer", {**STEER, "prompt": ""}, 400, "the prompt is empty"),
        ("/live/text", {"text": 3}, 400, "text must be a text"),
        ("/live/text", [], 400, "not a JSON object"),
        ("/live/text", b'{"text": ', 400, "not a JSON object"),
        ("/live/text", b"[" * 60_000, 400, "not a JSON object"),
        ("/live/text", b" " * 70_000, 413, "65536 bytes"),
        ("/live/label", {"latent": 8, "label": "x"}, 400, "latent=8"),
        ("/live/label", {"latent": 1, "label": "x" * 201}, 400, "at most 200"),
        ("/nothing", None, 404, "Not Found"),
        ("/live/steer", None, 405, "Method Not Allowed"),
        ("/data/../tree.json", None, 404, "Not Found"),
        ("/data/%2e%2e/tree.json", None, 404, "Not Found"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_get_one_sentence(server, path, values, status, message):
    found, error = server.error(path, values)
    assert (found, message in error) == (status, True), error


def test_a_form_is_no_json(server):
    status, error = server.error("/live/text", {"text": "w1"}, Content_Type="text/plain")
    assert (status, error) == (415, "send application/json.")


def test_one_generation_at_a_time(server):
    first: list[int] = []
    long = {**STEER, "new_tokens": 60}
    thread = threading.Thread(target=lambda: first.append(server.ask("/live/steer", long)[0]))
    thread.start()
    time.sleep(0.5)
    for path, values in (("/live/steer", STEER), ("/live/text", {"text": "w1"})):
        status, error = server.error(path, values)
        assert status == 503
        assert error == "the model is busy: wait for its other answer, and try again."
    assert server.ask("/live/state")[0] == 200  # all else is answered
    thread.join()
    assert first == [200]
    assert server.ask("/live/text", {"text": "w1"})[0] == 200


def test_a_visitor_who_leaves_frees_the_model(server):
    body = json.dumps({**STEER, "new_tokens": 100}).encode()
    head = (
        f"POST /live/steer HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        f"Authorization: token {server.token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    deadline = time.monotonic() + 4  # the whole would take over 6 seconds
    while server.ask("/live/text", {"text": "w1"})[0] == 503:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def malformed(drawn: random.Random, server: Server) -> bytes:
    """A request that is broken somewhere."""
    body = bytearray(json.dumps(STEER).encode())
    for _ in range(drawn.randint(1, 8)):
        body[drawn.randrange(len(body))] = drawn.randrange(256)
    path = drawn.choice(["/live/steer", "/live/text", "/live/label", "/data/x", "/%ff", "//", "*"])
    lines = [
        f"{drawn.choice(['POST', 'GET', 'PUT', 'X'])} {path} HTTP/1.{drawn.choice('019')}",
        f"Host: {drawn.choice([f'127.0.0.1:{server.port}', 'x', ''])}",
        f"Authorization: {drawn.choice([f'token {server.token}', 'token', '🦊'])}",
        f"Content-Type: {drawn.choice(['application/json', 'text/plain'])}",
        f"Content-Length: {drawn.choice([len(body), len(body) + 9, -1, 'x', 10**9])}",
        f"Cookie: {drawn.choice(['a=b', '=;=', 'sae-tree-1=x; $Version'])}",
    ]
    drawn.shuffle(lines) if drawn.random() < 0.1 else None
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + bytes(body)
    if drawn.random() < 0.2:
        request = drawn.randbytes(drawn.randrange(1, 300))
    return request[: drawn.randrange(1, len(request) + 1)] if drawn.random() < 0.3 else request


def test_a_thousand_malformed_requests(server):
    drawn = random.Random(0)
    for _ in range(1000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(malformed(drawn, server))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        assert not answer.startswith(b"HTTP/1.1 500"), answer
    assert server.process.poll() is None
    while server.ask("/live/text", {"text": "w1"})[0] == 503:  # one may have been well-formed
        time.sleep(0.1)
    assert server.ask("/live/steer", STEER)[0] == 200


def test_the_live_page_in_a_browser(server):
    with open_browser() as browser:
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        address = f"http://127.0.0.1:{server.port}/"
        page.goto(f"{address}?token={server.token}#latent={CHILD}")
        expect(page.locator("#latent h2")).to_contain_text(f"Latent {CHILD}")
        assert "token" not in page.url
        page.fill("#prompt", "w3 w4 w5")
        page.click("#read")
        expect(page.locator("#tokens .token")).to_have_count(3)
        page.locator("#tokens .token").first.click()
        expect(page.locator("#token a.latent").first).to_be_visible()

        page.fill("#new-tokens", "6")
        page.select_option("#what", "family")
        page.click("#add")
        expect(page.locator("#changes li")).to_contain_text("and its children")
        page.select_option("#mode", "set")
        page.locator("#changes input[type=number]").fill("9")
        expect(page.locator("#changes input[type=range]")).not_to_have_value("1")
        page.click("#generate")
        expect(page.locator("#steered")).to_be_visible()
        expected = compare(
            model(), sae(), "w3 w4 w5", {CHILD: 9.0, GRANDCHILD: 9.0}, "set", max_new_tokens=6
        )
        for name in ("unsteered", "steered", "control"):
            text = page.locator(f"#{name} p").last
            expect(text).to_have_text(getattr(expected, name))
        page.locator("#changes button").click()
        page.click("#generate")
        expect(page.locator("#live-status")).to_contain_text("Choose a latent")

        page.goto(f"{address}#latent={CHILD}")
        path = server.folder / "page" / "labels.json"
        with page.expect_response("**/live/label"):
            page.fill("#label", "my <i>label</i>")
        assert json.loads(path.read_text())["labels"] == {str(CHILD): "my <i>label</i>"}
        page.reload()
        expect(page.locator("#label")).to_have_value("my <i>label</i>")
        page.goto(f"{address}#latent={GRANDCHILD}")
        expect(page.locator("#family")).to_contain_text("my <i>label</i>")
        page.get_by_role("link", name="Guide").click()
        expect(page.locator("#about")).to_contain_text("Labels are saved in labels.json beside")
        assert problems == []


def test_sigterm_ends_it_in_the_middle_of_a_generation(server):
    port = free_port()
    process, token = start(server.folder, port)
    other = server._replace(port=port, token=token)
    answers: list[Any] = []
    long = {**STEER, "new_tokens": 100}  # which takes over 6 seconds
    thread = threading.Thread(target=lambda: answers.append(other.error("/live/steer", long)))
    thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    thread.join(30)
    assert time.monotonic() - begin < 4
    assert answers == [(503, "the server ends.")]
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in process.stderr.read()


def test_what_is_refused_before_the_model_loads(server, monkeypatch, capsys):
    def load(*_: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("sae_lens_matryoshka.cli.measuring.load_model_of", load)
    words = ["tree", str(server.folder / "sae"), "--out", str(server.folder / "page"), "--serve"]
    assert cli.main([*words, "--port", str(server.port)]) == 1
    error = capsys.readouterr().err
    assert error == (
        f"error: --port {server.port} can't be used (Address already in use): give another.\n"
    )
    assert cli.main([*words[:2], "--out", str(server.folder / "new"), "--serve"]) == 2
    assert "has no page with its data/: give --dataset to write one" in capsys.readouterr().err
    monkeypatch.setattr("sae_lens_matryoshka.cli.tree.find_spec", lambda name: None)
    assert cli.main([*words, "--port", str(free_port())]) == 2
    assert "pip install 'sae-lens-matryoshka[page]'" in capsys.readouterr().err
