"""Error messages for a port that cannot be opened."""

import resource
import socket

import pytest

from loraplex_router.app import listen, raise_file_limit


def test_a_port_in_use_is_named_with_its_flag():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} is in use: .* choose another --grpc-port"):
            listen("127.0.0.1", port, "--grpc-port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host: str):
    with pytest.raises(OSError, match=f"--host: {host} is not an address of this machine"):
        listen(host, 0, "--http-port")


def test_the_server_can_listen_on_an_ipv6_address():
    with listen("::1", 0, "--http-port") as opened:
        assert opened.family is socket.AF_INET6


def test_the_limit_of_open_files_is_raised_to_the_maximum():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
