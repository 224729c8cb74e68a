"""Tenants' files, tokens and rates, and the options with which clients bring their credentials; no sockets here."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from drift_gateway.access.auth import Complaints
from drift_gateway.access.security import SecurityOptions
from drift_gateway.access.tenants import (
    Bucket,
    Limits,
    Role,
    Tenant,
    Tenants,
    add_to_file,
    cache_salt,
    digest_of,
    new_token,
    token_entry,
)
from drift_gateway.commands.token import token as token_command
from drift_gateway.connection import Connection, Tls, connection_options, is_local
from drift_gateway.refusal import Reason, Refusal
from drift_gateway.server import Address, check_address
from drift_scheduler.errors import DriftError

DIGEST = "a" * 64


def tenants_of(tmp_path: Path, text: str) -> Tenants:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    return Tenants(path)


# --------------------------------------------------------------------------------------------------- the file


def test_a_tenant_has_what_the_file_says(tmp_path: Path) -> None:
    token = new_token()
    tenants = tenants_of(
        tmp_path,
        "[tenants.acme]\nrole = 'admin'\nrequests-per-second = 20\ntokens-per-second = 0.5\nmax-in-flight = 64\n"
        f"burst-seconds = 3\n{token_entry('acme', token)}note = 'of the batch jobs'\n[tenants.plain]\n",
    )
    acme = tenants.by_token(token, 0.0, 0.0)
    assert acme is tenants.all["acme"]
    assert (acme.name, acme.role, acme.limits) == ("acme", Role.ADMIN, Limits(20.0, 0.5, 64, 3.0))
    plain = tenants.all["plain"]
    assert (plain.role, plain.limits) == (Role.GENERATE, Limits())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tenants = ", "is not TOML"),
        (f"tenants = {'[' * 5000}{']' * 5000}", "is not TOML"),
        (f"[tenants.acme]\nmax-in-flight = {'9' * 5000}", "is not TOML"),
        (
            f"[tenants.acme]\nmax-in-flight = {'9' * 400}",
            "max-in-flight: a number of 400 digits is too large",
        ),
        ("[tenant.acme]", "no key 'tenant'; there are: tenants"),
        ("tenants = 3", "tenants is not a table"),
        ("[tenants]\nacme = 3", "tenants.acme is not a table"),
        ("[tenants.'a b']", "tenants.a b: a tenant's name is 1 to 64 of"),
        (
            "[tenants.acme]\nrate = 3",
            "tenants.acme: no key 'rate'; there are: role, requests-per-second, .*, tokens",
        ),
        (
            "[tenants.acme]\nrole = 'king'",
            "tenants.acme.role: no role 'king'; there are: info, generate, admin",
        ),
        ("[tenants.acme]\nrole = ['admin']", "no role"),
        ("[tenants.acme]\nrequests-per-second = 0", "requests-per-second: 0 is not a number above 0"),
        ("[tenants.acme]\ntokens-per-second = 'many'", "tokens-per-second: 'many' is not a number above 0"),
        ("[tenants.acme]\nburst-seconds = inf", "burst-seconds: inf is not a number above 0"),
        ("[tenants.acme]\nmax-in-flight = 2.5", "max-in-flight: 2.5 is not a whole number above 0"),
        ("[tenants.acme]\nmax-in-flight = true", "max-in-flight: True is not a whole number above 0"),
        ("[tenants.acme]\ncertificates = 'acme'", "give a list of names"),
        ("[tenants.acme]\ntokens = 'drift_secret'", "write each as its own"),
        ("[tenants.acme]\ntokens = ['drift_secret']", "tenants.acme.tokens is not a table"),
        ("[[tenants.acme.tokens]]\nsha256 = 'drift_secret'", "sha256 is not 64 hexadecimal digits"),
        (f"[[tenants.acme.tokens]]\nsha256 = '{DIGEST}'\nexpires = 'soon'", "expires: 'soon' is no date"),
        (
            f"[[tenants.acme.tokens]]\nsha256 = '{DIGEST}'\n[[tenants.globex.tokens]]\nsha256 = '{DIGEST}'",
            "tenants.globex.tokens: aaaaaaaa… is another tenant's as well",
        ),
        (
            "[tenants.acme]\ncertificates = ['one']\n[tenants.globex]\ncertificates = ['one']",
            "tenants.globex.certificates: 'one' is another tenant's as well",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(DriftError, match=complaint) as caught:
        tenants_of(tmp_path, text)
    assert str(tmp_path) in str(caught.value), "it names the file"
    assert "\n" not in str(caught.value)
    assert "drift_secret" not in str(caught.value), "and no token"


def test_a_file_that_is_not_there_or_open_to_all(tmp_path: Path) -> None:
    with pytest.raises(DriftError, match=r"cannot read .*absent.toml: No such file"):
        Tenants(tmp_path / "absent.toml")
    path = tmp_path / "tenants.toml"
    path.write_text("[tenants.acme]\n")
    path.chmod(0o666)
    with pytest.raises(DriftError, match="can be written by everybody"):
        Tenants(path)


@pytest.mark.parametrize(
    ("expires", "ends"),
    [
        ("2027-01-01", 1798761600.0),
        ("2027-01-01T12:00:00Z", 1798804800.0),
        ("2027-01-01T12:00:00", 1798804800.0),
    ],
)
def test_a_token_ends_when_the_file_says(tmp_path: Path, expires: str, ends: float) -> None:
    token = new_token()
    tenants = tenants_of(tmp_path, f"{token_entry('acme', token)}expires = {expires}\n")
    assert tenants.by_token(token, 0.0, ends - 1) is not None
    assert tenants.by_token(token, 0.0, ends) is None


def test_a_changed_file_is_noticed_within_a_second(tmp_path: Path) -> None:
    old, new = new_token(), new_token()
    tenants = tenants_of(tmp_path, token_entry("acme", old))
    tenants.reload(100.0)
    (tmp_path / "tenants.toml").write_text(f"[tenants.acme]\nmax-in-flight = 1\n{token_entry('acme', new)}")
    acme = tenants.all["acme"]
    assert tenants.by_token(old, 100.5, 0.0) is acme, "not looked at yet"
    assert tenants.by_token(old, 101.5, 0.0) is None
    assert tenants.by_token(new, 101.5, 0.0) is acme
    assert acme.limits.max_in_flight == 1


def test_a_file_that_went_wrong_or_away_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = new_token()
    tenants = tenants_of(tmp_path, token_entry("acme", token))
    path = tmp_path / "tenants.toml"
    path.write_text("[tenants.acme]\nrole = 'king'")
    tenants.reload(1.0)
    assert "no role 'king'" in caplog.text
    path.unlink()
    tenants.reload(2.0)
    assert "No such file" in caplog.text
    assert tenants.by_token(token, 2.0, 0.0) is not None


# ----------------------------------------------------------------------------------------------------- tokens


def test_a_new_token_is_printed_once_and_only_its_digest_kept(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    ran = [CliRunner().invoke(token_command, ["new", "--tenant", name, "--add", str(path)]) for name in "aba"]
    assert [result.exit_code for result in ran] == [0, 0, 0]
    tokens = [result.stdout.strip() for result in ran]
    assert len({*tokens}) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(token in path.read_text() for token in tokens)
    tenants = Tenants(path)
    names = [tenants.by_token(token, 0.0, 0.0) for token in tokens]
    assert [tenant.name for tenant in names if tenant is not None] == ["a", "b", "a"]


def test_without_a_file_the_lines_for_it_are_printed() -> None:
    result = CliRunner().invoke(token_command, ["new", "--tenant", "acme.example", "--days", "90"])
    (entry,) = tomllib.loads(result.stderr.partition("\n\n")[2])["tenants"]["acme.example"]["tokens"]
    assert entry["sha256"] == digest_of(result.stdout.strip())
    assert entry["expires"].tzinfo is not None


@pytest.mark.parametrize("name", ["", "a b", "-x", "a" * 65, "ä", 'a"]\n[tenants.b'])
def test_a_name_that_no_tenant_can_have(name: str) -> None:
    result = CliRunner().invoke(token_command, ["new", "--tenant", name])
    assert result.exit_code == 2
    assert "is no name for a tenant" in result.output
    assert "drift_" not in result.output


def test_a_token_is_never_put_where_it_would_break_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(before := f"[tenants.acme]\ntokens = [{{sha256 = '{DIGEST}'}}]\n")
    with pytest.raises(DriftError, match="add it by hand"):
        add_to_file(path, token_entry("acme", new_token()))
    assert path.read_text() == before


def test_salts_keep_tenants_and_salts_apart() -> None:
    assert cache_salt("", "") == ""
    salts = {
        cache_salt(tenant, salt) for tenant in ("", "a", "ab", "b") for salt in ("", "a", "b", "ba", "ab")
    }
    assert len(salts) == 20
    assert cache_salt("a", "b") == cache_salt("a", "b")


# ------------------------------------------------------------------------------------------------------ rates


def test_a_bucket_fills_at_its_rate_and_bears_debt() -> None:
    bucket = Bucket(rate=2.0, capacity=4.0)
    assert bucket.wait(10.0, 1.0) == 0
    bucket.take(10.0, 4.0)
    assert bucket.wait(10.0, 1.0) == pytest.approx(0.5)
    assert bucket.wait(10.5, 1.0) == 0
    bucket.take(10.5, 101.0)
    assert bucket.wait(10.5, 1.0) == pytest.approx(50.5), "the debt of 100 is waited off"
    assert bucket.wait(1000.0, 1.0) == 0
    bucket.take(1000.0, 4.0)
    assert bucket.wait(1000.0, 1.0) == pytest.approx(0.5), "no more than its capacity was saved up"
    assert bucket.wait(1000.0, 99.0) == pytest.approx(2.0), "nobody waits for more than it ever holds"


def test_a_rate_holds_over_time() -> None:
    tenant = Tenant("acme", limits=Limits(requests_per_second=5.0))
    served = 0
    refusals = []
    for tick in range(1000):
        now = tick / 100
        try:
            tenant.check(now)
        except Refusal as refusal:
            refusals.append(refusal)
            continue
        tenant.begin(now, prompt_tokens=1)
        tenant.end(now, output_tokens=1)
        served += 1
    assert {refusal.reason for refusal in refusals} == {Reason.RATE_LIMITED}
    assert all(0 < (refusal.retry_after or 0) <= 0.2 + 1e-9 for refusal in refusals)
    assert 50 <= served <= 56, "five a second for ten seconds, and one second's worth saved up"
    assert tenant.usage.refused == 1000 - served


def test_new_limits_hold_at_once_and_old_ones_keep_their_level() -> None:
    tenant = Tenant("acme", limits=Limits(requests_per_second=0.001))
    tenant.begin(1.0, 1)
    tenant.change(Role.INFO, Limits(requests_per_second=0.001))
    with pytest.raises(Refusal):
        tenant.check(1.0)
    tenant.change(Role.INFO, Limits())
    tenant.check(1.0)


# ---------------------------------------------------------------------------------------------------- addresses


FILES = (Path("c"), Path("k"))


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        (SecurityOptions(), "neither TLS nor authentication"),
        (SecurityOptions(tenants=Path("t")), "no TLS"),
        (SecurityOptions(*FILES), "no authentication"),
        (SecurityOptions(*FILES, client_ca=Path("ca")), None),
        (SecurityOptions(*FILES, tenants=Path("t")), None),
    ],
)
def test_other_machines_reach_it_only_with_tls_and_authentication(
    options: SecurityOptions, lacks: str | None
) -> None:
    everywhere = Address("0.0.0.0", 0)
    check_address(Address("127.0.0.1", 0), False, options)
    check_address(everywhere, True, options)
    if lacks is None:
        check_address(everywhere, False, options)
        return
    with pytest.raises(DriftError, match=f"{lacks} there; .* --tls-cert and --tls-key .* --insecure-bind"):
        check_address(everywhere, False, options)


# ------------------------------------------------------------------------------------------------------ clients


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("unix:/run/drift", True),
        ("dns:///localhost:1", True), ("ipv4:127.0.0.1:1", True), ("10.0.0.1:1", False), ("gpu-7:1", False),
        ("localhost.example:1", False), ("dns://10.0.0.1/localhost:1", False), ("[2001:db8::1]:1", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


def test_a_token_crosses_no_network_in_the_clear() -> None:
    with pytest.raises(DriftError, match="would cross the network unencrypted to gpu-7:1; use --tls"):
        Connection("gpu-7:1", "drift_x").check()
    Connection("gpu-7:1").check()
    Connection("gpu-7:1", "drift_x", Tls()).check()
    Connection("gpu-7:1", "drift_x", plaintext_token=True).check()
    for token in ("", "two words", "line\n", "tokën"):
        with pytest.raises(DriftError, match="no token has"):
            Connection("127.0.0.1:1", token).check()
    with pytest.raises(DriftError, match="go together"):
        Connection("gpu-7:1", None, Tls(certificate="c.pem")).check()
    with pytest.raises(DriftError, match=r"cannot read absent.pem: No such file"):
        Connection("gpu-7:1", None, Tls("absent.pem")).open(())


def connect(
    *arguments: str, env: dict[str, str] | None = None, **options: Any
) -> tuple[Connection | None, str]:
    found: list[Connection | None] = []

    @click.command()
    @connection_options(**options)
    def command(connection: Connection | None) -> None:
        found.append(connection)

    result = CliRunner().invoke(command, arguments, env=env or {"DRIFT_TOKEN": None})
    assert result.exit_code in {0, 2}, result.exception
    return (found or [None])[0], result.output


def test_options_of_commands_that_connect() -> None:
    assert connect(default="127.0.0.1:7")[0] == Connection("127.0.0.1:7")
    assert connect()[0] is None
    assert connect("--target", "h:1", "--tls")[0] == Connection("h:1", None, Tls())
    files = ("--tls-ca", "ca", "--tls-cert", "c", "--tls-key", "k", "--tls-server-name", "n")
    expected = Connection("h:1", "drift_x", Tls(Path("ca"), Path("c"), Path("k"), "n"))
    assert connect("--target", "h:1", "--token", "drift_x", *files)[0] == expected
    assert connect("--target", "[::1]:1", env={"DRIFT_TOKEN": "drift_y"})[0] == Connection(
        "[::1]:1", "drift_y"
    )
    nothing, output = connect("--target", "h:1", env={"DRIFT_TOKEN": "drift_y"})
    assert nothing is None
    assert "Error: the token would cross the network unencrypted" in output
    assert "drift_y" not in output


# ---------------------------------------------------------------------------------------------------------- log


def test_a_flood_of_refusals_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints(pause=10.0)
    for tick in range(2500):
        complaints.add("/a/b: no", tick / 100)
    assert len(caplog.records) == 3
    assert "refused /a/b: no (and 999 more since the last such line)" in caplog.text
