"""Texts without the secrets of the addresses in them, for messages, logs and tables."""

from __future__ import annotations

import re

# Paths are written with one slash for two.
_KNOWN = r"(?:https?|ftps?|sftp|ssh|s3a?|gs|gcs|abfss?|az|adl|hdfs|webhdfs|tcp|tls|wss?):/"
_URL = re.compile(rf"(\b(?:[A-Za-z][\w.+-]{{,30}}://|{_KNOWN}(?!/)))([^\s?#<>\"`]*)((?:[?#][^\s'\"<>`]*)?)")
# Libraries also show parts of an address. The words before the colon begin specifications of texts.
_USER = re.compile(r"(?<![\w-])(?!(?:file|ids|hf):)[^\s:/@'\"(<]{1,100}:[^\s:/@'\"<>]{1,200}@(?=[\w\[])")
_QUERY = re.compile(r"\?[\w.%~\[\]-]{1,100}=[^\s'\"<>`]*")
_CLOSING = ")]}:;,."


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost user, password, query and fragment: a signature is in the query."""
    return _USER.sub("", _QUERY.sub(_closing, _URL.sub(_without_secrets, text)))


def _without_secrets(url: re.Match[str]) -> str:
    scheme, place, query = url.groups()
    # An address may hold another one, and so may a password.
    parts = _without_user(place).split("://")
    return scheme + "://".join(_without_user(part) for part in parts) + _ending(query)


def _without_user(place: str) -> str:
    host, slash, path = place.partition("/")
    if "@" in host:
        return host.rpartition("@")[2] + slash + path
    _, colon, port = host.partition(":")
    # A password may hold slashes; digits before one are a port.
    return path.rpartition("@")[2] if colon and not port.isdigit() and "@" in path else place


def _closing(query: re.Match[str]) -> str:
    return _ending(query[0])


def _ending(query: str) -> str:
    """Return the punctuation behind a query, which belongs to the sentence."""
    return query[len(query.rstrip(_CLOSING)) :]
