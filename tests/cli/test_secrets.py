"""Addresses with a password or a signature, given to commands: nothing that is printed shows either."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command_bench import run

pytestmark = pytest.mark.integration
ADDRESS = "://user:TOPSECRET@127.0.0.1:9/x?X-Amz-Signature=TOPSECRET"


@pytest.mark.parametrize("scheme", ["http", "ftp", "s3", "nosuch"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("select", "--store", "{}", "--remove", "2", "--out", "plan.json"),
        ("fit", "--store", "{}", "--plan", "2:4", "--out", "o.safetensors"),
        ("inspect", "{}"),
        ("verify", "{}", "--debug"),
        ("evaluate", "{}", "--text", "ids:ids.npy"),
        ("estimate", "{}", "--remove", "2"),
        ("estimate", "org/name", "--remove", "{}"),
        ("capture", "org/name", "--calibration", "file:{}", "--store", "store"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_print_no_secret_of_an_address(
    scheme: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    result = run(*(part.format(scheme + ADDRESS) for part in arguments))
    assert result.exit_code in {2, 3}, result.output
    assert "SECRET" not in result.output
    assert "SECRET" not in str(result.exception)
