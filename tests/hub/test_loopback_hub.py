"""The loopback Hub answers the real client as the real Hub does."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from datasets import load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from tests.conftest import HUB
from tests.loopback_hub import LoopbackHub

REPO = "ann/saes"
FILES = {"README.md": b"# SAEs", "one/cfg.json": b"{}", "one/w.safetensors": bytes(range(200))}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the client would have slept before its retries."""
    waits: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=waits.append))
    return waits


def api(hub: LoopbackHub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_reading(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    client = api(hub)
    info = client.repo_info(REPO)
    assert (info.id, info.private, len(info.sha or "")) == (REPO, False, 40)
    assert client.model_info(REPO, revision=info.sha).sha == info.sha
    assert client.repo_exists(REPO)
    assert not client.repo_exists("ann/other")
    assert client.file_exists(REPO, "one/cfg.json")
    assert not client.file_exists(REPO, "two/cfg.json")
    assert sorted(client.list_repo_files(REPO)) == sorted(FILES)
    assert {entry.path for entry in client.list_repo_tree(REPO)} == {"README.md", "one"}
    inside = {entry.path for entry in client.list_repo_tree(REPO, "one")}
    assert inside == {"one/cfg.json", "one/w.safetensors"}

    path = hf_hub_download(REPO, "one/cfg.json", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == b"{}"
    folder = client.snapshot_download(REPO, cache_dir=tmp_path)
    assert {name: (Path(folder) / name).read_bytes() for name in FILES} == FILES
    assert Path(folder).name == info.sha
    url = hf_hub_url(REPO, "one/w.safetensors", endpoint=hub.url)
    metadata = get_hf_file_metadata(url, token=False)
    assert (metadata.commit_hash, metadata.size, metadata.location) == (info.sha, 200, url)
    assert len(metadata.etag or "") == 64  # kept in LFS
    assert ("HEAD", "/ann/saes/resolve/main/one/cfg.json") in hub.requests

    with pytest.raises(EntryNotFoundError):
        client.hf_hub_download(REPO, "two/cfg.json", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree(REPO, "two"))
    with pytest.raises(RevisionNotFoundError):
        client.hf_hub_download(REPO, "one/cfg.json", revision="dev", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        client.hf_hub_download("ann/other", "one/cfg.json", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("asked", "status", "part", "content_range"),
    [
        ("bytes=0-7", 206, slice(0, 8), "bytes 0-7/200"),
        ("bytes=190-", 206, slice(190, 200), "bytes 190-199/200"),
        ("bytes=-5", 206, slice(195, 200), "bytes 195-199/200"),
        ("bytes=150-999", 206, slice(150, 200), "bytes 150-199/200"),
        ("", 200, slice(0, 200), None),
    ],
)
def test_ranges(
    hub: LoopbackHub, asked: str, status: int, part: slice, content_range: str | None
) -> None:
    hub.add(REPO, FILES)
    url = hf_hub_url(REPO, "one/w.safetensors", endpoint=hub.url)
    with urlopen(Request(url, headers={"Range": asked})) as reply:
        assert (reply.status, reply.read()) == (status, FILES["one/w.safetensors"][part])
        assert reply.headers["Content-Range"] == content_range
        assert reply.headers["Accept-Ranges"] == "bytes"
    with pytest.raises(HTTPError, match="416"):
        urlopen(Request(url, headers={"Range": "bytes=200-"}))


def test_writing(hub: LoopbackHub, tmp_path: Path) -> None:
    client = api(hub, hub.add_user("ann"))
    assert client.whoami()["name"] == "ann"
    assert client.create_repo(REPO).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_repo(REPO)
    client.create_repo(REPO, exist_ok=True)
    shas = [client.repo_info(REPO).sha]
    large = random.Random(0).randbytes(12 * 10**6)
    for file, name in ((b"{}", "cfg.json"), (large, "data")):
        shas.append(client.upload_file(path_or_fileobj=file, path_in_repo=name, repo_id=REPO).oid)
    assert hub.files(REPO) == {"cfg.json": b"{}", "data": large}
    assert [path[:8] for method, path in hub.requests if method == "PUT"] == ["/upload/"]
    path = client.hf_hub_download(REPO, "data", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == large

    for name, data in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    options: dict[str, Any] = {"folder_path": tmp_path / "folder", "path_in_repo": "sub"}
    shas.append(client.upload_folder(repo_id=REPO, **options).oid)
    assert client.upload_folder(repo_id=REPO, **options).oid == shas[-1]  # nothing new
    added = {f"sub/{name}": data for name, data in FILES.items()}
    assert hub.files(REPO) == {"cfg.json": b"{}", "data": large, **added}
    operations = [
        CommitOperationDelete("sub/one/"),
        CommitOperationDelete("data"),
        CommitOperationAdd("cfg.json", b"[]"),
    ]
    shas.append(client.create_commit(REPO, operations, commit_message="Less").oid)
    assert hub.files(REPO) == {"cfg.json": b"[]", "sub/README.md": FILES["README.md"]}
    assert len(set(shas)) == 5
    assert client.repo_info(REPO).sha == shas[-1]
    path = client.hf_hub_download(REPO, "cfg.json", revision=shas[1], cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == b"{}"
    hub.add(REPO, {})
    assert client.repo_info(REPO).sha not in shas  # though the files are the same
    client.delete_repo(REPO)
    assert not client.repo_exists(REPO)


def test_failed_commit_changes_nothing(hub: LoopbackHub) -> None:
    hub.add(REPO, FILES)
    client = api(hub, hub.add_user("ann"))
    sha = client.repo_info(REPO).sha

    def invalid_option(method: str, url: str, body: bytes) -> bool:
        headers = {"Authorization": f"Bearer {client.token}"}
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(url, body, headers, method=method))
        return caught.value.code == 400

    new = {"key": "file", "value": {"path": "new", "content": "AA=="}}
    not_uploaded = {"key": "lfsFile", "value": {"path": "big", "oid": "0" * 64}}
    for last in (not_uploaded, {"key": "file", "value": {}}, {"key": "unheard of", "value": {}}):
        lines = f"{json.dumps(new)}\n{json.dumps(last)}".encode()
        assert invalid_option("POST", f"{hub.url}/api/models/{REPO}/commit/main", lines)
    hub.tickets["ticket"] = (hub.repos[REPO], "0" * 64)
    assert invalid_option("PUT", f"{hub.url}/upload/ticket", b"of another SHA-256")

    missing = [CommitOperationAdd("new", b"1"), CommitOperationDelete("missing")]
    with pytest.raises(EntryNotFoundError):
        client.create_commit(REPO, missing, commit_message="Deletes what is not there")
    with pytest.raises(HfHubHTTPError, match="412"):
        client.create_commit(REPO, missing[:1], commit_message="Late", parent_commit="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        client.create_commit(REPO, missing[:1], commit_message="Branch", revision="dev")
    with (
        hub.answer_with(403, only="/upload/"),
        pytest.raises(RuntimeError, match="Error while uploading"),
    ):
        client.upload_file(path_or_fileobj=b"1", path_in_repo="new.bin", repo_id=REPO)
    assert hub.files(REPO) == FILES
    assert client.repo_info(REPO).sha == sha


def test_writing_to_a_repo_of_another_user(hub: LoopbackHub) -> None:
    hub.add(REPO, FILES)
    for token, status, kind in (
        (hub.add_user("bob"), 403, HfHubHTTPError),
        ("hf_unknown", 401, HfHubHTTPError),
        (False, 401, RepositoryNotFoundError),
    ):
        client = api(hub, token)
        with pytest.raises(HfHubHTTPError) as caught:
            client.upload_file(path_or_fileobj=b"1", path_in_repo="new", repo_id=REPO)
        assert (type(caught.value), caught.value.response.status_code) == (kind, status)
        with pytest.raises(HfHubHTTPError) as caught:
            client.delete_repo(REPO)
        assert (type(caught.value), caught.value.response.status_code) == (kind, status)
        with pytest.raises(HfHubHTTPError) as caught:
            client.create_repo("ann/new")
        assert caught.value.response.status_code == status
    assert hub.files(REPO) == FILES
    assert list(hub.repos) == [REPO]


def test_private_repo(hub: LoopbackHub, tmp_path: Path) -> None:
    owner, other = api(hub, hub.add_user("ann")), api(hub, hub.add_user("bob"))
    owner.create_repo(REPO, private=True)
    owner.upload_file(path_or_fileobj=b"{}", path_in_repo="cfg.json", repo_id=REPO)
    for client, status in ((api(hub), 401), (other, 404)):
        assert not client.repo_exists(REPO)
        with pytest.raises(RepositoryNotFoundError) as caught:
            client.hf_hub_download(REPO, "cfg.json", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as error:
        api(hub, "hf_unknown").hf_hub_download(REPO, "cfg.json", cache_dir=tmp_path)
    assert type(error.value) is HfHubHTTPError
    assert owner.repo_info(REPO).private
    path = owner.hf_hub_download(REPO, "cfg.json", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("status", "code", "of_info", "of_download"),
    [
        (400, "", BadRequestError, LocalEntryNotFoundError),
        (401, "", HfHubHTTPError, HfHubHTTPError),
        (401, "RepoNotFound", RepositoryNotFoundError, RepositoryNotFoundError),
        (403, "", HfHubHTTPError, LocalEntryNotFoundError),
        (404, "", HfHubHTTPError, LocalEntryNotFoundError),
        (404, "RepoNotFound", RepositoryNotFoundError, RepositoryNotFoundError),
        (500, "", HfHubHTTPError, LocalEntryNotFoundError),
        (503, "", HfHubHTTPError, LocalEntryNotFoundError),
    ],
)
def test_statuses_on_demand(
    hub: LoopbackHub,
    waits: list[float],
    tmp_path: Path,
    status: int,
    code: str,
    of_info: type[Exception],
    of_download: type[Exception],
) -> None:
    hub.add(REPO, FILES)
    client = api(hub, hub.add_user("ann"))
    retries = [1.0] * 5 if status >= 500 else []
    with hub.answer_with(status, code):
        with pytest.raises(of_info) as caught:
            client.repo_info(REPO)
        assert (type(caught.value), waits) == (of_info, [])
        with pytest.raises(of_download) as caught:
            client.hf_hub_download(REPO, "README.md", cache_dir=tmp_path)
        assert (type(caught.value), waits) == (of_download, retries)
        with pytest.raises(of_info) as caught:
            client.upload_file(path_or_fileobj=b"1", path_in_repo="new", repo_id=REPO)
        assert (type(caught.value), waits) == (of_info, retries * 2)
    with hub.answer_with(status, code, only="/commit/"), pytest.raises(of_info):
        client.upload_file(path_or_fileobj=b"1", path_in_repo="new", repo_id=REPO)
    assert hub.files(REPO) == FILES
    assert client.hf_hub_download(REPO, "README.md", cache_dir=tmp_path)


@pytest.mark.parametrize("size", [200, 21 * 2**20])  # the client writes 10 MiB at a time
def test_download_cut_short(
    hub: LoopbackHub, waits: list[float], tmp_path: Path, size: int
) -> None:
    hub.add(REPO, {**FILES, "one/w.safetensors": random.Random(0).randbytes(size)})
    options: dict[str, Any] = {"endpoint": hub.url, "token": False, "cache_dir": tmp_path}
    with hub.cut_short("w.safetensors"):
        with pytest.raises(Exception, match="peer closed connection") as caught:
            hf_hub_download(REPO, "one/w.safetensors", **options)
        assert (caught.typename, waits) == ("RemoteProtocolError", [1] * 5)
        with pytest.raises(Exception, match="peer closed connection"):
            snapshot_download(REPO, **options)
        assert Path(hf_hub_download(REPO, "one/cfg.json", **options)).read_bytes() == b"{}"
    assert not list(tmp_path.rglob("w.safetensors"))
    assert all(file.stat().st_size < 10 for file in tmp_path.rglob("blobs/*"))
    path = hf_hub_download(REPO, "one/w.safetensors", **options)
    assert Path(path).read_bytes() == hub.files(REPO)["one/w.safetensors"]


def test_stopping_and_forgetting(hub: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add(REPO, FILES)
    assert api(hub).repo_exists(REPO)
    hub.stop()
    with pytest.raises(Exception, match="Connection refused") as caught:
        api(hub).repo_info(REPO)
    assert caught.typename == "ConnectError"
    hub.start()
    assert api(hub).repo_exists(REPO)
    hub.reset()
    assert hub.requests == []
    assert not api(hub).repo_exists(REPO)
    assert capfd.readouterr().err == ""


SAELENS = """
import sys
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=32))
torch.nn.init.normal_(sae.b_dec)
sae.save_model(sys.argv[1])
upload_saes_to_huggingface({"one": sys.argv[1]}, "ann/saes")
loaded = SAE.from_pretrained("ann/saes", "one").state_dict()
for name, tensor in sae.state_dict().items():
    torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
"""


def test_saelens_uploads_and_loads(hub: LoopbackHub, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub.add_user("ann"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", SAELENS, str(tmp_path / "sae")]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=300)
    files = hub.files(REPO)
    assert set(files) == {"one/cfg.json", "one/sae_weights.safetensors", "README.md"}
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert files[f"one/{name}"] == (tmp_path / "sae" / name).read_bytes()


def test_data_sets_are_read_by_the_real_client(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)]
    files = {"train.jsonl": "".join(rows).encode(), "test.jsonl": rows[0].encode()}
    HUB.add("ann/texts", files)  # that of all tests, whose address datasets took at its import
    for streaming in (False, True):
        data = load_dataset("ann/texts", cache_dir=str(tmp_path), streaming=streaming)
        assert [row["text"] for row in data["train"]] == ["text 0", "text 1", "text 2"]
        assert [row["text"] for row in data["test"]] == ["text 0"]
