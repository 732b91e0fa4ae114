"""Mutual TLS between a real router and a real shard: both refuse peers without a certificate from the authority."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme

from loraplex import Client
from loraplex_protos import shard_pb2 as pb
from loraplex_protos.shard_pb2_grpc import ShardServiceStub
from tests.e2e.processes import START_SECONDS, Router, Shard, free_port
from tests.e2e.tiny import Oracle, byte_tokenizer


@dataclass(frozen=True)
class Certificates:
    """Issues certificates of any authority, together with the trusted authority's."""

    folder: Path
    trusted: trustme.CA

    def flags(self, name: str, signed_by: trustme.CA) -> list[str]:
        leaf = signed_by.issue_cert(name)
        folder = self.folder / f"{name}-{signed_by is self.trusted}"
        folder.mkdir()
        leaf.cert_chain_pems[0].write_to_path(folder / "tls.crt")
        leaf.private_key_pem.write_to_path(folder / "tls.key")
        self.trusted.cert_pem.write_to_path(folder / "ca.crt")
        files = {"cert": "tls.crt", "key": "tls.key", "ca": "ca.crt"}
        return [f"--mtls-{flag}={folder / file}" for flag, file in files.items()]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"), trustme.CA())


@pytest.fixture(scope="module")
def shard(model: Path, certificates: Certificates) -> Iterator[tuple[Shard, str]]:
    """A shard with one rank, and its address."""
    address = f"localhost:{free_port()}"
    flags = certificates.flags("localhost", certificates.trusted)
    with Shard(f"--model={model}", f"--listen={address}", "--kv-blocks=64", "--threads=1", *flags) as running:
        wait_for_line(running, "is serving at")
        yield running, address


def wait_for_line(process: Router | Shard, text: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while text not in process.log:
        assert process.process.poll() is None and time.monotonic() < deadline, process.log
        time.sleep(0.05)


def test_a_router_with_a_certificate_of_the_shards_authority_drives_it(
    shard: tuple[Shard, str], certificates: Certificates, oracle: Oracle
):
    _, address = shard
    with Router(f"--shards={address}", *certificates.flags("router", certificates.trusted)) as router:
        router.wait_until("loraplex_replicas", 1, seconds=START_SECONDS)
        with Client(router.address) as client:
            answer = client.generate("encrypted", max_new_tokens=8, ignore_eos=True)
        expected, _ = oracle.generate(byte_tokenizer().encode("encrypted"), None, 8)
        assert [token.id for token in answer.sequences[0].tokens] == expected
        assert router.terminate() == 0


def test_routers_without_such_a_certificate_are_refused_and_log_it(
    shard: tuple[Shard, str], certificates: Certificates
):
    refusing, address = shard
    with (
        Router(f"--shards={address}") as without,
        Router(f"--shards={address}", *certificates.flags("router", trustme.CA())) as with_anothers,
    ):
        for router in without, with_anothers:
            wait_for_line(router, f"replica {address}: rank 0 is out of reach")
            assert router.health() == 503
        assert "--mtls-ca" in with_anothers.log and "--mtls-ca" not in without.log
    wait_for_line(refusing, "CERTIFICATE_VERIFY_FAILED")


def test_a_client_without_a_certificate_is_refused(shard: tuple[Shard, str], certificates: Certificates):
    refusing, address = shard
    credentials = grpc.ssl_channel_credentials(certificates.trusted.cert_pem.bytes())
    with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as refused:
        ShardServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    wait_for_line(refusing, "PEER_DID_NOT_RETURN_A_CERTIFICATE")
