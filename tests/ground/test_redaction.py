"""What is secret in an address never comes out of a text; what is not secret stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.errors import CheckpointError, InputNotFoundError, NumericsError
from ghoststream.redaction import without_secrets

pytestmark = [pytest.mark.unit, pytest.mark.property]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:SECRET@127.0.0.1:9/x does not answer", "http://127.0.0.1:9/x does not answer"),
        ("no folder at http:/user:SECRET@h/x", "no folder at http:/h/x"),
        ("'s3://key:SE/CR@b/a?X-Amz-Signature=SECRET%2B&x=1': gone;", "'s3://b/a': gone;"),
        ("cannot get /x?sig=SECRET (Caused by T)", "cannot get /x (Caused by T)"),
        ("https://c.net/b?sv=1&sig=SECRET, and", "https://c.net/b, and"),
        ("gs://b/x#access_token=SECRET.", "gs://b/x."),
        ("'https://u:SE'CRET@h/x'", "'https://h/x'"),
        ("https://proxy/https://u:SECRET@h/x", "https://proxy/https://h/x"),
        ("['https://a?x=SECRET','https://b?y=SECRET']", "['https://a','https://b']"),
        ("simplecache::s3://k:SECRET@b/x", "simplecache::s3://b/x"),
        ('no bucket "user:SECRET@127.0.0.1:9": name', 'no bucket "127.0.0.1:9": name'),
        ("https://SECRET@github.com/a/b", "https://github.com/a/b"),
    ],
)
def test_user_password_and_query_are_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/path@v1 is fine",
        "s3://bucket/models@v1/x",
        "file:/home/me@corp/x.txt",
        "file:///home/me@corp/x.txt",
        "tcp://host:8786",
        "ids:me@corp.npy",
        "what is it? a = b, user@host; C:/x",
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


_SECRET = "S3cr3tSignature"
_PLAIN = st.text("abcxyz0189-_.~", min_size=1, max_size=8)


@given(
    scheme=st.sampled_from(["http", "https", "s3", "ftp", "gs", "abfs", "tcp", "redis+tls"]),
    user=_PLAIN,
    host=_PLAIN,
    path=st.lists(_PLAIN, max_size=3).map("/".join),
    noise=st.text("/:&=!$()*+,;%-", max_size=6),
    around=st.sampled_from(["{}", "'{}'", '"{}"', "({})", "x={};", "<{}>", "[{}]"]),
)
def test_no_shape_of_an_address_lets_a_secret_through(
    scheme: str, user: str, host: str, path: str, noise: str, around: str
) -> None:
    for url in (
        f"{scheme}://{user}:{_SECRET}{noise}@{host}/{path}",
        f"{scheme}://{_SECRET}@{host}/{path}",
        f"{scheme}://{host}/{path}?{user}={_SECRET}{noise}",
        f"{scheme}://{host}/{path}?{user}={noise}{_SECRET}",
        f"{scheme}://{host}/{path}#{_SECRET}",
    ):
        shown = without_secrets("cannot open " + around.format(url) + " at all")
        assert _SECRET not in shown, url
        assert shown.endswith(" at all")


@pytest.mark.parametrize(
    "text", ["http://" * 50_000, "https:/" * 50_000, "?a=" * 50_000, "a." * 100_000, "http://a:" * 20_000]
)
def test_long_texts_take_no_longer_than_they_are(text: str) -> None:
    # A search that goes back from every place takes minutes on these; this one takes some 0.1 s.
    assert len(without_secrets(text)) <= len(text)


@pytest.mark.parametrize("kind", [InputNotFoundError, CheckpointError, NumericsError])
def test_every_error_of_ours_is_without_secrets(kind: type[Exception]) -> None:
    error = kind("no store at s3://k:SECRET@b/x?sig=SECRET; check it")
    assert str(error) == error.args[0] == "no store at s3://b/x; check it"
