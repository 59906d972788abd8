"""A store in a bucket: a real S3 server on this machine is spoken to over HTTP, by this process and by
workers."""

from __future__ import annotations

import functools
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.activations import ActivationStore, verify_store
from ghoststream.cli import main
from ghoststream.errors import InputNotFoundError, RequestError, StoreError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Reduction, Search, Source, Text
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.fit import fit
from ghoststream.stages.select import select
from ghoststream.statistics import Ranges
from ghoststream.testing.models import save_tiny
from ghoststream.testing.states import random_states, store_of
from ghoststream.testing.stores import small_layout, small_request, small_states, small_store
from tests.helpers.forking import ForkServer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("s3fs", "obstore", "moto", "flask", "flask_cors")
        ),
        reason="needs S3 clients and a server: pip install 'ghoststream[dev]'",
    ),
]

S, T = 7, 16
SPANS = "1:3 4:5"
SHARD = "hidden/1/c.0.0.0"
_START_SECONDS = 60.0

# Dies before it writes the shard of h[3], beside which h[2] is committed.
KILLED_CAPTURE = """
import os, signal, sys
from zarr.storage import FsspecStore
from ghoststream.options import Compute, Text
from ghoststream.stages.capturing.capture import capture

put = FsspecStore.set

async def fatal(self, key, value, *rest):
    if key == "hidden/3/c.0.0.0":
        os.kill(os.getpid(), signal.SIGKILL)
    await put(self, key, value, *rest)

FsspecStore.set = fatal
model, ids, store = sys.argv[1:]
text = Text(spec=f"ids:{ids}", sequences=7, length=16)
capture(model, calibration=text, compute=Compute(micro_batch=2), store=store)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.05)


class Server:
    """An S3 server in a process of its own, with an empty bucket ``bucket``; it forgets everything when it
    ends."""

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, _free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, at the same address each time."""
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out)
        _wait_for(self.port, self._process)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def requests(self) -> Counter[tuple[str, str]]:
        """Return how many requests of each method there were for each path, by the server's own account."""
        return Counter(re.findall(r'"(GET|HEAD|PUT) (/bucket/\S*) HTTP', self.log.read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty bucket, made known by AWS's environment variables."""
    made = Server(tmp_path_factory.mktemp("s3") / "server.log")
    with pytest.MonkeyPatch.context() as patch:
        made.start()
        try:
            for name, value in _variables(made.address).items():
                patch.setenv(name, value)
            # The library keeps what it opened, with the credentials that there were then.
            type(_file_system()).clear_instance_cache()
            _file_system().mkdir("bucket")
            yield made
        finally:
            made.kill()


@pytest.fixture(scope="module")
def endpoint(server: Server) -> str:
    """Address of the server."""
    return server.address


def _variables(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _file_system() -> Any:
    import s3fs

    return s3fs.S3FileSystem()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of six layers, and token ids."""
    root = tmp_path_factory.mktemp("model")
    np.save(root / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return save_tiny("llama", root / "model"), root / "ids.npy"


@pytest.fixture(scope="module")
def captured(model: tuple[Path, Path], endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same capture at ``s3://bucket/store`` and in a folder, which is returned."""
    folder = tmp_path_factory.mktemp("local") / "store"
    for place in (folder, "s3://bucket/store"):
        _capture(model, place)
    return folder


def _capture(model: tuple[Path, Path], store: str | Path) -> ActivationStore:
    folder, ids = model
    text = Text(spec=f"ids:{ids}", sequences=S, length=T)
    return capture(folder, calibration=text, compute=Compute(micro_batch=2), store=store)


def _fit(
    store: str | Path,
    plan: str,
    out: Path,
    *,
    range_sequences: int | None = None,
    folds: int = 4,
    progress: Progress | None = None,
    **reduction: Any,
) -> OperatorSet:
    """Fit from a store in ranges of a size of the test's own."""
    make = functools.partial(Ranges.make, range_sequences=range_sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranges, "make", make)
        return fit(
            plan,
            Source(store=store),
            out=out,
            search=Search(folds=folds),
            reduction=Reduction(**reduction),
            progress=progress,
        )


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {"run.json", ".lock"}
    }


def _objects(place: str) -> dict[str, bytes]:
    bucket = _file_system()
    files: dict[str, bytes] = bucket.cat(bucket.find(place))
    named = {name.removeprefix(f"{place}/"): content for name, content in files.items()}
    named.pop("run.json", None)
    return named


def test_a_bucket_holds_the_objects_that_a_folder_holds(captured: Path) -> None:
    assert _objects("bucket/store") == _files(captured)
    assert verify_store("s3://bucket/store") == []
    there, here = ActivationStore.open("s3://bucket/store"), ActivationStore.open(str(captured))
    for layer in (0, 6):
        assert torch.equal(there.read(layer, 0, S), here.read(layer, 0, S))
        assert torch.equal(there.read(layer, 2, 5), here.read(layer, 2, 5))


def test_a_capture_that_was_killed_goes_on_in_the_bucket(
    warm: ForkServer, captured: Path, model: tuple[Path, Path]
) -> None:
    done = warm.python(KILLED_CAPTURE, *model, "s3://bucket/killed")
    assert done.exit_code == -signal.SIGKILL, done.stderr
    # Whether the commit of h[2] came first is up to the thread that does it; those before it are promised.
    assert ActivationStore.open("s3://bucket/killed").completed_layers() in {(0, 1), (0, 1, 2)}
    assert _capture(model, "s3://bucket/killed").complete
    assert _objects("bucket/killed") == _files(captured)


def test_operators_and_plans_are_those_of_a_folder(captured: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    _fit(captured, SPANS, here, range_sequences=1)
    _fit("s3://bucket/store", SPANS, there, range_sequences=1, workers=2)
    assert here.read_bytes() == there.read_bytes()
    assert select(2, Source(store="s3://bucket/store")) == select(2, Source(store=captured))


def _asked(server: Server, before: Counter[tuple[str, str]], method: str) -> Counter[str]:
    """Return how often each object of the store was asked for since then."""
    found = server.requests() - before
    names = {
        path: n for (how, path), n in found.items() if how == method and path.startswith("/bucket/store/")
    }
    return Counter({path.removeprefix("/bucket/store/"): n for path, n in names.items()})


def test_ranges_ask_for_no_shard_but_those_they_read(server: Server, captured: Path, tmp_path: Path) -> None:
    del captured
    read = {"hidden/1/c.0.0.0", "hidden/3/c.0.0.0"}
    asked = []
    for size in (1, S):
        before = server.requests()
        out = tmp_path / f"{size}.safetensors"
        _fit("s3://bucket/store", "1:3", out, range_sequences=size, folds=0)
        heads, gets = (_asked(server, before, method) for method in ("HEAD", "GET"))
        shards = {name: n for name, n in heads.items() if name.startswith("hidden/") and "/c." in name}
        assert len(shards) == 7
        assert {n for name, n in shards.items() if name not in read} == {1}, "whether it is there, once"
        assert {name for name in gets if name.startswith("hidden/") and "/c." in name} == read
        asked.append({name: n for name, n in (heads + gets).items() if name not in read})
    # Seven ranges in the place of one: only more reads of what they read.
    assert asked[0] == asked[1]


def test_workers_of_a_cluster_open_the_bucket_themselves(
    server: Server, captured: Path, tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    _fit(captured, SPANS, here, range_sequences=2)
    before = server.requests()
    # Processes of their own over TCP: they have nothing but the URL and the environment.
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        _fit("s3://bucket/store", SPANS, there, range_sequences=2, scheduler=client)
    assert here.read_bytes() == there.read_bytes()
    read = {f"hidden/{layer}/c.0.0.0" for layer in (1, 3, 4, 5)}
    heads = _asked(server, before, "HEAD")
    others = {
        name: n
        for name, n in heads.items()
        if name.startswith("hidden/") and "/c." in name and name not in read
    }
    assert len(others) == 3
    assert set(others.values()) == {1}, "by the client; the worker checks what it reads"


def test_the_command_line_takes_a_url(
    captured: Path, model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del captured
    folder, ids = model
    out = tmp_path / "operators.safetensors"
    arguments = ["--calibration", f"ids:{ids}", "--sequences", S, "--length", T, "--micro-batch", 2]
    for command in (
        ["capture", folder, *arguments, "--store", "s3://bucket/store"],
        ["verify", "s3://bucket/store"],
        ["fit", "--store", "s3://bucket/store", "--plan", "1:3", "--out", out],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in command])
        assert ended.value.code in (0, None), capsys.readouterr().err
    assert out.is_file()


def test_a_changed_or_missing_object_is_found(endpoint: str, tmp_path: Path) -> None:
    del endpoint
    layout = small_layout()
    small_store("s3://bucket/broken", layout)
    files, key = _file_system(), f"bucket/broken/{SHARD}"
    content = bytearray(files.cat(key))
    content[5] ^= 1
    files.pipe(key, bytes(content))
    problems = verify_store("s3://bucket/broken")
    assert len(problems) == 1
    assert f"{SHARD}" in problems[0]
    with pytest.raises(StoreError, match=rf"shard {SHARD}, chunk 0"):
        _fit("s3://bucket/broken", "1:2", tmp_path / "operators.safetensors")
    assert not (tmp_path / "operators.safetensors").exists()
    files.copy("bucket/broken/hidden/2/c.0.0.0", key)
    for size in (1, 4):
        with pytest.raises(StoreError, match=rf"shard {SHARD}, chunk \d .* is not what was committed"):
            _fit("s3://bucket/broken", "1:2", tmp_path / "o.safetensors", range_sequences=size, folds=0)
    files.rm(key)
    with pytest.raises(StoreError, match=f"{SHARD} is missing, though it was committed"):
        ActivationStore.open("s3://bucket/broken")


def test_address_and_credentials_can_be_given_as_options(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_store("s3://bucket/options")
    for name in _variables(endpoint):
        monkeypatch.delenv(name)
    options = {"key": "an-id", "secret": "a-secret", "client_kwargs": {"endpoint_url": endpoint}}
    with ActivationStore.open("s3://bucket/options", storage_options=options) as store:
        assert torch.equal(store.read(1, 0, 10), small_states(small_layout(), 1))
    assert verify_store("s3://bucket/options", storage_options=options) == []


def test_places_that_cannot_be_reached_are_named(endpoint: str) -> None:
    with pytest.raises(InputNotFoundError, match="no activation store at s3://bucket/nothing"):
        ActivationStore.open("s3://bucket/nothing")
    with pytest.raises(InputNotFoundError, match="no activation store at s3://no-bucket/store"):
        ActivationStore.open("s3://no-bucket/store")
    with pytest.raises(
        InputNotFoundError, match=r"cannot write to s3://no-bucket/store .* make the bucket first"
    ):
        ActivationStore.create("s3://no-bucket/store", **small_request())
    nobody = {
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{_free_port()}"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2},
    }
    with pytest.raises(RequestError, match=r"s3://bucket/store does not answer .* check the address"):
        ActivationStore.open("s3://bucket/store", storage_options=nobody)


class _KillAfterOneRange(SilentProgress):
    def __init__(self, server: Server) -> None:
        self.server, self.done = server, 0

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.done:
            self.server.kill()


def test_a_server_that_is_lost_while_it_is_read_is_named_and_the_work_goes_on_with_the_next(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    del endpoint
    uri = "s3://bucket/lost"
    folder = store_of(tmp_path / "store", random_states(3, (6, 8, 10)))
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    _fit(folder, "1:3", here, range_sequences=1)
    second = Server(tmp_path / "second.log")
    second.start()
    for name, value in {**_variables(second.address), "AWS_MAX_ATTEMPTS": "2"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # those that are kept know the other server
    try:
        _file_system().mkdir("bucket")
        _file_system().put(folder, "bucket/lost", recursive=True)
        store = ActivationStore.open(uri)
        with pytest.raises(
            StoreError,
            match=rf"{uri}: reading hidden/\d/c\S+ failed \(.+\); check the disk, or the connection",
        ):
            _fit(uri, "1:3", there, range_sequences=1, workers=1, progress=_KillAfterOneRange(second))
        assert not there.exists()
        with pytest.raises(StoreError, match=rf"{uri}: reading hidden/2/zarr.json failed \(.+\); check the"):
            store.read(2, 0, 3)
        with pytest.raises(RequestError, match=f"{uri} does not answer"):
            _fit(uri, "1:3", there, range_sequences=1)
        second.start()
        _file_system().mkdir("bucket")
        _file_system().put(folder, "bucket/lost", recursive=True)
        before = second.requests()
        _fit(uri, "1:3", there, range_sequences=1, workers=1)
    finally:
        second.kill()
        s3fs.S3FileSystem.clear_instance_cache()
    assert here.read_bytes() == there.read_bytes()
    assert 0 < _reads(second, before) < 2 * 6 * 2, "the range that was finished is not read again"


def _reads(server: Server, before: Counter[tuple[str, str]]) -> int:
    found = server.requests() - before
    return sum(n for (how, path), n in found.items() if how == "GET" and "/hidden/" in path and "/c." in path)


def test_the_object_store_of_obstore_serves_as_well(endpoint: str) -> None:
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    place = ObjectStore(
        S3Store("bucket", prefix="obstore", endpoint=endpoint, client_options={"allow_http": True})
    )
    small_store(place)
    assert verify_store(place) == []
    assert verify_store("s3://bucket/obstore") == []
