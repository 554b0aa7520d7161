"""Servers and settings that the tests of remote stores share."""

import os
from collections.abc import Iterator

import pytest

from ddkmix.config import Storage
from ddkmix.storage.connections import disconnect
from tests.storage.servers import WebServer, web_server

FAST = 0.001
"""Back-off of the tests, in seconds."""


@pytest.fixture(autouse=True)
def _no_connection_left() -> Iterator[None]:
    """Connections are closed after every test, so that one that leaks is noticed where it leaks."""
    yield
    disconnect()


@pytest.fixture
def settings() -> Storage:
    """Three attempts, and little patience."""
    return Storage(attempts=3, timeout_s=10.0)


@pytest.fixture
def web() -> Iterator[WebServer]:
    """A web server with ranges and strong ETags."""
    with web_server() as server:
        yield server


@pytest.fixture
def plain_web() -> Iterator[WebServer]:
    """A web server that knows neither ranges nor ETags."""
    with web_server(ranges=False, etags=False) as server:
        yield server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 store in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; endpoint and credentials are in the environment, as a user has them."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{os.urandom(4).hex()}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}"


def put_s3(location: str, content: bytes) -> str:
    """Write a file to the S3 store; returns its location."""
    import boto3

    bucket, _, key = location.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=key, Body=content)
    client.close()
    return location
