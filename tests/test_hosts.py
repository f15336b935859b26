import pytest

from mlfleet._hosts import has_loopback_host, is_loopback

THIS_MACHINE = [
    "localhost",
    "LocalHost",
    "localhost.",
    "mlflow.localhost",
    "a.b.LOCALHOST.",
    "127.0.0.1",
    "127.0.0.0",
    "127.255.255.255",
    "::1",
    "[::1]",
    "0:0:0:0:0:0:0:1",
    "::ffff:127.0.0.1",
    "[::FFFF:127.8.9.1]",
]
OTHERS = [
    "",
    None,
    ".",
    "localhost.example",
    "notlocalhost",
    "localhost.localdomain",
    "mlflow",
    "127.0.0.1.example",
    "126.255.255.255",
    "128.0.0.1",
    "0.0.0.0",
    "::",
    "[::]",
    "::2",
    "::ffff:10.0.0.1",
    "10.0.0.1",
    "[::1",
]


@pytest.mark.parametrize("host", THIS_MACHINE)
def test_a_loopback_host_is_recognized(host: str) -> None:
    assert is_loopback(host)
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    assert has_loopback_host(f"http://{bracketed}:5000/path")
    assert has_loopback_host(f"https://user:secret@{bracketed}")
    assert has_loopback_host(f"//{bracketed}:5000")


@pytest.mark.parametrize("host", OTHERS)
def test_another_host_is_not_loopback(host: str | None) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "url",
    ["", "sqlite:///mlflow.db", "file:///tmp/runs", "http://", "http://[::1", "http://10.0.0.1", "localhost:5000"],
)
def test_a_url_without_a_loopback_host_is_not_loopback(url: str) -> None:
    assert not has_loopback_host(url)
