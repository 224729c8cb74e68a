"""TLS and clients' certificates over real sockets, with certificates made on the spot."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from click.testing import CliRunner
from gateway_under_test import UnderTest, run_with_gateway
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drift_gateway import client as api
from drift_gateway import serving
from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import new_token, token_entry
from drift_gateway.commands.serve import serve as serve_command
from drift_gateway.connection import Connection, Tls
from drift_scheduler.errors import DriftError

LONG_AGO = datetime(2019, 1, 1, tzinfo=UTC)


@dataclass
class Authority:
    """A CA whose certificates are files in a folder."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self._ca = trustme.CA()
        self.ca = self.folder / f"{self.name}.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(
        self, name: str, *hosts: str, common_name: str | None = None, **fields: Any
    ) -> tuple[Path, Path]:
        """Certificate and key of this name; for `localhost` and 127.0.0.1 where no host is given."""
        made = self._ca.issue_cert(*(hosts or ("localhost", "127.0.0.1")), common_name=common_name, **fields)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "another-ca")


def secured(certificate: Path, key: Path, ca: Path | None = None, tenants: Path | None = None) -> Security:
    return Security(SecurityOptions(certificate, key, ca, tenants))


async def answer(target: str, tls: Tls | None, token: str | None = None) -> api.RequestError | str:
    """The model that a server on a new connection says it serves, or the error."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    channel = Connection(target, token, tls).open_async(options)
    async with channel:
        client = api.AsyncDriftClient.__new__(api.AsyncDriftClient)
        client._info = api._INFO_STUB(channel)
        try:
            return (await client.server_info(timeout=10.0)).model.name
        except api.RequestError as error:
            return error


# --------------------------------------------------------------------------------------------------- serving


def test_tls_and_a_token(ours: Authority, theirs: Authority, tmp_path: Path) -> None:
    token, tenants = new_token(), tmp_path / "tenants.toml"
    tenants.write_text(token_entry("acme", token))
    security = secured(*ours.issue("server"), tenants=tenants)

    async def body(under: UnderTest) -> None:
        completion = await under.client.generate(token_ids=[1], max_tokens=9).complete()
        assert completion.usage.output_tokens == 9
        for wrong in (None, Tls(theirs.ca), Tls(ours.ca, server_name="elsewhere.example")):
            error = await answer(under.target, wrong, token)
            assert isinstance(error, api.Unavailable), error
            if wrong is None:
                line = api.unanswered(under.target, str(error))
                assert line.endswith("closed at once; where a server speaks TLS, give --tls-ca or --tls"), (
                    line
                )
        nobody = await answer(under.target, Tls(ours.ca))
        assert isinstance(nobody, api.NotAuthenticated)

        def blocking() -> str:
            with api.DriftClient(under.target, token, Tls(ours.ca)) as client:
                return client.server_info().model.name

        assert await asyncio.to_thread(blocking) == "fake"

    run_with_gateway(body, security=security, token=token, tls=Tls(ours.ca))


def test_a_certificate_for_another_name(ours: Authority) -> None:
    security = secured(*ours.issue("server", "drift.example"))

    async def body(under: UnderTest) -> None:
        assert isinstance(await answer(under.target, Tls(ours.ca)), api.Unavailable)
        assert await answer(under.target, Tls(ours.ca, server_name="drift.example")) == "fake"

    run_with_gateway(body, security=security)


# ---------------------------------------------------------------------------------------------------- mTLS


def test_clients_certificates_stand_for_tenants(ours: Authority, theirs: Authority, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    token = new_token()
    tenants.write_text(
        "[tenants.acme]\ncertificates = ['acme-client']\n"
        "[tenants.globex]\nrole = 'info'\ncertificates = ['client.globex.example']\n"
        f"[tenants.initech]\n{token_entry('initech', token)}"
    )
    security = secured(*ours.issue("server"), ours.ca, tenants)
    acme = Tls(ours.ca, *ours.issue("acme", "nowhere.example", common_name="acme-client"))
    globex = Tls(ours.ca, *ours.issue("globex", "client.globex.example"))
    unknown = Tls(ours.ca, *ours.issue("unknown", "unknown.example", common_name="unknown"))
    forged = Tls(ours.ca, *theirs.issue("forged", common_name="acme-client"))

    async def body(under: UnderTest) -> None:
        completion = await under.client.generate(token_ids=[1], max_tokens=3).complete()
        assert completion.usage.output_tokens == 3
        assert security.tenants is not None
        assert security.tenants.all["acme"].usage.output_tokens == 3
        async with api.AsyncDriftClient(under.target, tls=globex) as client:
            await client.server_info()
            with pytest.raises(api.NotAllowed, match="tenant 'globex' has 'info'"):
                await client.generate(token_ids=[1]).complete()
        stranger = await answer(under.target, unknown)
        assert isinstance(stranger, api.NotAuthenticated)
        assert "unknown, unknown.example" in str(stranger)
        for refused in (Tls(ours.ca), forged):
            assert isinstance(await answer(under.target, refused), api.Unavailable)
        assert await answer(under.target, unknown, token) == "fake", "a token speaks for itself"
        wrong = await answer(under.target, acme, new_token())
        assert isinstance(wrong, api.NotAuthenticated), (
            "a wrong token is wrong whatever certificate comes with it"
        )

    run_with_gateway(body, security=security, tls=acme)


def test_without_tenants_each_certificate_is_one(ours: Authority) -> None:
    security = secured(*ours.issue("server"), ours.ca)
    client = Tls(ours.ca, *ours.issue("client", "one.example", common_name="one"))

    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1], max_tokens=3).complete()
        assert security.tenants is not None
        assert list(security.tenants.all) == ["one"]
        assert under.engine.submits()[0].salt
        channel = under.client._channel
        drain = channel.unary_unary("/drift.v1.AdminService/Drain")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "it has a port of its own"

    run_with_gateway(body, security=security, tls=client)


def test_services_that_yield_work_behind_a_certificate(ours: Authority) -> None:
    """Reflection is written as generators, which grpc.aio treats differently from coroutines."""
    security = secured(*ours.issue("server"), ours.ca)
    client = Tls(ours.ca, *ours.issue("client", common_name="one"))

    async def body(under: UnderTest) -> None:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(under.client._channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="") for _ in range(3)]
        answers = [message async for message in stub.ServerReflectionInfo(iter(asked))]
        assert len(answers) == 3
        names = [service.name for service in answers[0].list_services_response.service]
        assert "drift.v1.GenerationService" in names

    run_with_gateway(body, security=security, tls=client)


# --------------------------------------------------------------------------------------------------- renewal


def test_a_renewed_certificate_is_taken_up_without_a_restart(ours: Authority, theirs: Authority) -> None:
    security = secured(*ours.issue("server"))

    async def body(under: UnderTest) -> None:
        assert await answer(under.target, Tls(ours.ca)) == "fake"
        assert isinstance(await answer(under.target, Tls(theirs.ca)), api.Unavailable)
        running = aiter(under.client.generate(token_ids=[1]))
        under.engine.step()
        await anext(running)
        theirs.issue("server")  # into the same files
        assert await answer(under.target, Tls(theirs.ca)) == "fake"
        assert isinstance(await answer(under.target, Tls(ours.ca)), api.Unavailable)
        under.engine.step()
        await anext(running)  # what runs goes on

    run_with_gateway(body, security=security, tls=Tls(ours.ca), paused=True)


def test_a_renewed_certificate_that_is_wrong_is_not(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = ours.issue("server")
    security = secured(certificate, key)

    async def body(under: UnderTest) -> None:
        certificate.write_text("half a file")
        security.reload()
        assert await answer(under.target, Tls(ours.ca)) == "fake"
        assert f"{certificate} has no certificate in PEM form" in caplog.text
        ours.issue("server")
        assert await answer(under.target, Tls(ours.ca)) == "fake"
        assert "took up the changed certificate" in caplog.text

    with caplog.at_level("INFO"):
        run_with_gateway(body, security=security)


# ---------------------------------------------------------------------------------------------------- faults


def _encrypted(ours: Authority) -> SecurityOptions:
    certificate, key = ours.issue("server")
    plain = key.rename(ours.folder / "plain.key")
    command = ["openssl", "pkey", "-in", plain, "-aes256", "-passout", "pass:secret", "-out", key]
    subprocess.run(command, check=True, capture_output=True)
    return SecurityOptions(certificate, key)


def _mismatched(ours: Authority) -> SecurityOptions:
    return SecurityOptions(ours.issue("server")[0], ours.issue("other")[1])


def _written(ours: Authority, certificate: str | None = None, key: str | None = None) -> SecurityOptions:
    files = ours.issue("server")
    for path, text in zip(files, (certificate, key), strict=True):
        if text is not None:
            path.write_text(text)
    return SecurityOptions(*files)


def _dated(ours: Authority, begin: datetime, end: datetime) -> SecurityOptions:
    return SecurityOptions(*ours.issue("server", not_before=begin, not_after=end))


NOW = datetime.now(UTC)
FAULTS: dict[str, tuple[Callable[[Authority], SecurityOptions], str]] = {
    "missing certificate": (
        lambda ours: SecurityOptions(ours.folder / "absent.pem", ours.issue("server")[1]),
        "cannot read .*absent.pem: No such file",
    ),
    "missing key": (
        lambda ours: SecurityOptions(ours.issue("server")[0], ours.folder / "absent.key"),
        "cannot read .*absent.key: No such file",
    ),
    "a folder": (
        lambda ours: SecurityOptions(ours.folder, ours.issue("server")[1]),
        "cannot read .*: Is a directory",
    ),
    "no certificate": (lambda ours: _written(ours, "hello"), "server.pem has no certificate in PEM form"),
    "a key for a certificate": (
        lambda ours: SecurityOptions(ours.issue("server")[1], ours.issue("server")[1]),
        "server.key has no certificate in PEM form",
    ),
    "damaged": (
        lambda ours: _written(ours, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        "server.pem has a damaged certificate",
    ),
    "damaged, and no ASCII": (
        lambda ours: _written(ours, "-----BEGIN CERTIFICATE-----\nÄÄÄÄ\n-----END CERTIFICATE-----\n"),
        "server.pem has a damaged certificate",
    ),
    "no key": (lambda ours: _written(ours, key="hello"), "server.key has no key in PEM form"),
    "another's key": (_mismatched, "other.key is not the key of the certificate in .*server.pem"),
    "passphrase": (_encrypted, "server.key is protected by a passphrase"),
    "expired": (
        lambda ours: _dated(ours, LONG_AGO, LONG_AGO + timedelta(days=90)),
        "the certificate in .*server.pem expired: it was valid until Apr  1 .* 2019 GMT",
    ),
    "not yet": (
        lambda ours: _dated(ours, NOW + timedelta(days=2), NOW + timedelta(days=9)),
        "the certificate in .*server.pem is not valid before",
    ),
    "no CA in the CA's file": (
        lambda ours: SecurityOptions(*ours.issue("server"), ours.issue("client")[1]),
        "client.key has no certificate in PEM form",
    ),
    "a client's certificate for a CA": (
        lambda ours: SecurityOptions(*ours.issue("server"), ours.issue("client")[0]),
        "client.pem has certificates, but none of a CA",
    ),
    "no key given": (lambda ours: SecurityOptions(ours.issue("server")[0]), "--tls-cert needs --tls-key"),
    "no certificate given": (
        lambda ours: SecurityOptions(key=ours.issue("server")[1]),
        "--tls-key needs --tls-cert",
    ),
    "CA alone": (
        lambda ours: SecurityOptions(client_ca=ours.ca),
        "--tls-client-ca needs --tls-cert and --tls-key",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_file_is_said(ours: Authority, fault: str) -> None:
    make, complaint = FAULTS[fault]
    options = make(ours)
    with pytest.raises(DriftError, match=complaint) as caught:
        Security(options)
    assert "\n" not in str(caught.value)


def test_a_certificate_that_ends_soon_is_warned_about(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    Security(_dated(ours, LONG_AGO, NOW + timedelta(days=3)))
    assert "expires in 3.0 days" in caplog.text


def test_serve_says_it_before_anything_is_started(ours: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async def started(*_: Any) -> int:
        raise AssertionError("it went on")

    monkeypatch.setattr(serving, "_serve", started)
    options = _mismatched(ours)
    flags = ["--listen", "127.0.0.1:0", "--tls-cert", str(options.certificate), "--tls-key", str(options.key)]
    result = CliRunner().invoke(serve_command, flags)
    assert result.exit_code == 2
    assert "is not the key of the certificate" in result.output


def test_the_configuration_file_reaches_it_too(
    ours: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[serving.ServeOptions] = []
    monkeypatch.setattr(serving, "serve", lambda options, console: asked.append(options) or 0)
    config = tmp_path / "drift.toml"
    config.write_text("tls-cert = 'c.pem'\ntls-key = 'k.pem'\ntls-client-ca = 'ca.pem'\ntenants = 't.toml'\n")
    result = CliRunner().invoke(serve_command, ["--config", str(config), "--tls-key", "other.pem"])
    assert (result.exit_code, result.output) == (0, "")
    expected = SecurityOptions(Path("c.pem"), Path("other.pem"), Path("ca.pem"), Path("t.toml"))
    assert asked[0].security == expected
