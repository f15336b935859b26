"""Masking of secrets in text that people and log files see."""

from __future__ import annotations

import pytest

from mlfleet._text.masking import mask, mask_query, mask_uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:PW@host/x", "http://***@host/x"),
        ("http://TOKEN@host/x", "http://***@host/x"),
        ("htp://u:PW@h", "htp://***@h"),
        ("http://u:PW/x@host", "http://***@host"),
        ("http://u:P#W?x@host/y", "http://***@host/y"),
        ("from http://u:PW@a to http://v:QW/@b.", "from http://***@a to http://***@b."),
        ("mysql+pymysql://u:PW@h:3306/db", "mysql+pymysql://***@h:3306/db"),
        ("https://host/f?password=PW", "https://host/f?password=***"),
        ("https://host/f?a=1&token=T&b=2#c", "https://host/f?a=1&token=***&b=2#c"),
        ("https://host/f?sv=1&sig=SI%2FG%3D", "https://host/f?sv=1&sig=***"),
        ("https://host/f?X-Amz-Signature=S&X-Amz-Date=D", "https://host/f?X-Amz-Signature=***&X-Amz-Date=D"),
        ("https://host/f?X-Amz-Credential=C", "https://host/f?X-Amz-Credential=***"),
        ("https://host/f?X-Goog-Signature=S", "https://host/f?X-Goog-Signature=***"),
        ("https://host/f?AWSAccessKeyId=A&Signature=S", "https://host/f?AWSAccessKeyId=***&Signature=***"),
        ("https://host/f?api_key=K&client_secret=S&key=K", "https://host/f?api_key=***&client_secret=***&key=***"),
        ("https://host/f?pass%77ord=PW", "https://host/f?pass%77ord=***"),
        ("https://host/#access_token=T", "https://host/#access_token=***"),
        ("'https://host/f?token=T'", "'https://host/f?token=***'"),
    ],
)
def test_secrets_of_uris_are_masked(text: str, shown: str) -> None:
    assert mask_uri(text) == shown
    assert mask(text, ()) == shown


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@host/repo.git",
        "git+ssh://git@host/repo.git",
        "git@host:repo.git",
        "https://host:8080/repo@v1.0",
        "package @ git+https://host/repo.git@v1.0",
        "https://host/f?keyword=x&page=2&monkey=y&token=",
        '{"uri": "http://host", "b": "c@d"}',
        "http://[::1]:5000/x",
    ],
)
def test_text_that_is_not_secret_is_kept(text: str) -> None:
    assert mask_uri(text) == text


def test_known_secrets_are_masked_the_longest_first() -> None:
    assert mask("abcdef abc", ("abc", "abcdef", "")) == "*** ***"


def test_a_whole_query_can_be_masked() -> None:
    assert mask_query("see http://u:p@h/f?a=1 now") == "see http://***@h/f?*** now"
