"""API keys: tenants, what they may use, and limits that always hold."""

import asyncio
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from loraplex_protos.errors import ForbiddenError, RateLimitedError, UnauthenticatedError
from loraplex_router.access import followed_file, key_file, read_beside
from loraplex_router.access.key_file import KeyFile, KeyFileError, read_tenants, read_tenants_beside
from loraplex_router.access.keys import Keys, TenantSettings, read_bearer
from loraplex_router.access.strict_yaml import read_yaml
from loraplex_router.access.tenant import Allowance, Remaining, Tenant
from loraplex_router.api.http.call import key_of
from loraplex_router.vocabulary.references import AdapterReference, MergedReference

OLD_KEY, NEW_KEY, ADMIN_KEY = "old secret", "new secret", "admin secret"


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys() -> Keys:
    acme = TenantSettings(keys=[hashed(OLD_KEY), hashed(NEW_KEY)], adapters=["acme/*", "sql"])
    return Keys({"acme": acme, "operator": TenantSettings(keys=[hashed(ADMIN_KEY)], admin=True)})


def test_keys_in_headers_are_utf_8_or_latin_1() -> None:
    for encoding in ("utf-8", "latin-1"):
        for header, value in ((b"authorization", "Bearer schlüssel"), (b"x-api-key", "schlüssel")):
            assert key_of(Headers(raw=[(header, value.encode(encoding))])) == "schlüssel"
    assert key_of(Headers(raw=[])) is None


def test_all_keys_of_a_tenant_are_the_same_tenant(keys: Keys) -> None:
    assert keys.tenant(OLD_KEY) is keys.tenant(NEW_KEY)
    assert keys.tenant(OLD_KEY).name == "acme"
    assert keys.tenant(ADMIN_KEY).name == "operator"


@pytest.mark.parametrize("key", [None, "", "wrong", hashed(OLD_KEY), "é€"])
def test_unknown_keys_are_refused(keys: Keys, key: str | None) -> None:
    with pytest.raises(UnauthenticatedError):
        keys.tenant(key)


@given(st.text())
def test_a_refusal_does_not_contain_the_key(key: str) -> None:
    keys = Keys({"acme": TenantSettings(keys=[hashed(OLD_KEY)])})
    with pytest.raises(UnauthenticatedError) as refusal:
        keys.tenant("prefix " + key)
    assert "prefix" not in str(refusal.value)


def test_looking_up_a_key_costs_as_much_however_many_there_are() -> None:
    def calls(number: int, key: str) -> int:
        keys = Keys({f"tenant {n}": TenantSettings(keys=[hashed(f"key {n}")]) for n in range(number)})
        for n in range(number):
            keys.key_for(f"tenant {n}")
        count = 0

        def profile(_: object, event: str, __: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            with suppress(UnauthenticatedError):
                keys.tenant(key)
        finally:
            sys.setprofile(None)
        return count

    for key in ("key 0", "unknown"):
        assert calls(1, key) == calls(1000, key)


def test_only_an_administrator_administers(keys: Keys) -> None:
    assert keys.administrator(ADMIN_KEY).admin
    with pytest.raises(ForbiddenError):
        keys.administrator(OLD_KEY)
    with pytest.raises(UnauthenticatedError):
        keys.administrator(None)


def test_without_tenants_everyone_may_do_everything() -> None:
    keys = Keys({})
    assert not keys.required
    for key in (None, "any"):
        tenant = keys.administrator(key)
        tenant.check_adapter(AdapterReference("org/any"))
        for _ in range(1000):
            tenant.begin(0.0)


def test_a_tenant_uses_the_base_model_and_the_adapters_of_its_patterns(keys: Keys) -> None:
    tenant = keys.tenant(OLD_KEY)
    for adapter in (None, AdapterReference("sql"), AdapterReference("acme/x"), AdapterReference("acme/x/y")):
        tenant.check_adapter(adapter)
    for id in ("sql2", "other/x", "ACME/x", "acme"):
        with pytest.raises(ForbiddenError):
            tenant.check_adapter(AdapterReference(id))


def test_a_merge_needs_every_part_allowed(keys: Keys) -> None:
    tenant = keys.tenant(OLD_KEY)
    tenant.check_adapter(MergedReference((AdapterReference("sql"), AdapterReference("acme/x"))))
    with pytest.raises(ForbiddenError, match="other/x"):
        tenant.check_adapter(MergedReference((AdapterReference("sql"), AdapterReference("other/x"))))


def use(tenant: Tenant, tokens: int, now: float) -> None:
    """A call that takes so many tokens, and no time."""
    visit = tenant.begin(now)
    visit.spend(tokens, now)
    visit.end_part()


def test_the_number_of_concurrent_requests_is_limited() -> None:
    tenant = Tenant("acme", Allowance(max_requests=2))
    first, _ = tenant.begin(0.0), tenant.begin(0.0)
    with pytest.raises(RateLimitedError, match="2 requests"):
        tenant.begin(0.0)
    first.end_part()
    tenant.begin(0.0)


def test_what_runs_in_the_background_does_not_keep_a_tenants_other_requests_waiting() -> None:
    tenant = Tenant("acme", Allowance(max_requests=1, max_adapters=1))
    background = tenant.begin(0.0, ["a"], background=True)
    tenant.begin(0.0, ["b"])
    for refused in (False, True):
        with pytest.raises(RateLimitedError, match="1 requests"):
            tenant.begin(0.0, [], background=refused)
    background.end_part()
    tenant.begin(0.0, ["c"], background=True)


def test_a_call_of_several_parts_counts_once_and_until_all_have_ended() -> None:
    tenant = Tenant("acme", Allowance(max_requests=1, requests_per_minute=60))
    visit = tenant.begin(0.0)
    visit.begin_part()
    visit.end_part()
    with pytest.raises(RateLimitedError):
        tenant.begin(0.0)
    visit.end_part()
    tenant.begin(0.0)
    assert tenant.remaining(0.0) == [Remaining("requests", 60, 58, 2.0)]


def test_the_number_of_adapters_in_use_is_limited() -> None:
    tenant = Tenant("acme", Allowance(max_adapters=2))
    visits = [tenant.begin(0.0, names) for names in (["a"], ["a", "b"], ["b"], [])]
    with pytest.raises(RateLimitedError, match="2 adapters at once"):
        tenant.begin(0.0, ["c"])
    visits[0].end_part()
    with pytest.raises(RateLimitedError):
        tenant.begin(0.0, ["c"])
    visits[1].end_part()
    tenant.begin(0.0, ["c"])
    with pytest.raises(ForbiddenError, match="name fewer"):
        tenant.begin(0.0, ["a", "b", "c"])


def test_the_rate_of_requests_is_limited() -> None:
    tenant = Tenant("acme", Allowance(requests_per_minute=6))
    for _ in range(6):
        use(tenant, 1000, 100.0)
    for _ in range(3):  # a refused request costs nothing
        with pytest.raises(RateLimitedError, match="6 requests a minute") as refusal:
            tenant.begin(100.0)
        assert refusal.value.retry_after == pytest.approx(10)
    use(tenant, 1, 110.1)


def test_used_tokens_are_restored_at_the_tenants_rate() -> None:
    tenant = Tenant("acme", Allowance(tokens_per_minute=60))
    use(tenant, 69, 100.0)  # nine more than were left
    with pytest.raises(RateLimitedError) as refusal:
        tenant.begin(100.0)
    assert refusal.value.retry_after == pytest.approx(10)
    with pytest.raises(RateLimitedError):
        tenant.begin(109.9)
    tenant.begin(110.1)


def test_a_prompt_counts_when_it_is_queued_so_that_requests_that_come_together_cannot_exceed_the_rate() -> None:
    tenant = Tenant("acme", Allowance(tokens_per_minute=60))
    visits = [tenant.begin(100.0) for _ in range(3)]
    visits[0].spend(100, 100.0)
    for visit in visits[1:]:
        with pytest.raises(RateLimitedError):
            visit.spend(1, 100.0)
    visits[0].spend(20, 100.0)  # its answer


def test_at_most_one_minute_of_tokens_accumulates() -> None:
    tenant = Tenant("acme", Allowance(tokens_per_minute=60))
    use(tenant, 60, 3600.0)
    with pytest.raises(RateLimitedError):
        tenant.begin(3600.5)
    assert tenant.remaining(3600.5) == [Remaining("tokens", 60, 0, 59.5)]


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), min_size=1, max_size=60))
def test_use_never_exceeds_the_rate_by_more_than_one_request(steps: list[tuple[float, int]]) -> None:
    tenant, now, used = Tenant("acme", Allowance(tokens_per_minute=120)), 0.0, 0
    for pause, tokens in steps:
        now += pause
        try:
            use(tenant, tokens, now)
        except RateLimitedError as error:
            assert error.retry_after > 0
            continue
        used += tokens
        assert used <= 120 + now * 2 + 50


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer ", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_a_key_is_read_from_a_bearer_header(header: str | None, key: str | None) -> None:
    assert read_bearer(header) == key


YAML = f"""
tenants:
  acme:
    keys: [{hashed(OLD_KEY)}]
    adapters: ["acme/*"]
    max_requests: 8
    tokens_per_minute: 60000
  operator:
    keys: ["{hashed(ADMIN_KEY)}"]
    admin: true
"""


def test_a_key_file_is_yaml_or_json(tmp_path: Path) -> None:
    for name, text in (
        ("keys.yaml", YAML),
        ("keys.json", json.dumps({"tenants": {"acme": {"keys": [hashed(OLD_KEY)]}}})),
    ):
        (tmp_path / name).write_text(text)
        assert Keys(read_tenants(tmp_path / name)).tenant(OLD_KEY).name == "acme"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "the file: "),
        ("{}", "tenants: Field required"),
        ("tenants: {}", "tenants: "),
        ("tenants: {acme: {}}", "tenants.acme.keys: Field required"),
        ("tenants: {acme: {keys: [SECRET]}}", "tenants.acme.keys.0: "),
        (YAML.replace("acme:", '"":'), "a tenant's name has 1 to 128 printable characters"),  # shown as of no tenant
        (YAML.replace("acme:", '"[other]":'), "a tenant's name has 1 to 128 printable characters"),
        (YAML.replace("max_requests", "max_request"), "tenants.acme.max_request: "),
        (YAML.replace("60000", "0"), "tenants.acme.tokens_per_minute: "),
        (YAML.replace("tokens_per_minute: 60000", "kv_share: 1.5"), "tenants.acme.kv_share: "),
        (YAML.replace(hashed(ADMIN_KEY), hashed(OLD_KEY)), "a key is listed twice"),
        ("tenants:\n  acme: [SECRET", "neither YAML nor JSON in line "),
        (f"{YAML}\n  operator:\n    keys: [SECRET]", "repeats a name in the mapping that begins in line "),
        ("\x00SECRET", "neither YAML nor JSON"),
        (YAML.replace("8", "2026-02-30"), "an impossible value, such as a date that does not exist, in line 6"),
        (YAML.replace("true", "!!bool SECRET"), "an impossible value, such as a date that does not exist, in line 10"),
        ("tenants: !!map SECRET", "neither YAML nor JSON in line 1"),
    ],
)
def test_errors_of_key_files_name_the_place_without_showing_the_content(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeyFileError) as refusal:
        read_tenants(path)
    assert fault in str(refusal.value)
    assert "SECRET" not in str(refusal.value)


KINDS = "bool", "int", "float", "null", "timestamp", "binary", "str", "map", "seq", "set", "omap", "pairs", "x"
TAGS = ["", *(f"!!{kind} " for kind in KINDS)]
VALUES = "maybe", "2026-02-30", "9" * 5000, "0b", "'_'", "[x]", "{x: y}", "*a", "&a x", "<<", "=", ""


@given(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(VALUES) | st.text(max_size=4)), max_size=4))
def test_whatever_stands_in_a_file_of_yaml_is_read_or_an_error_of_yaml(values: list[tuple[str, str]]) -> None:
    text = "\n".join(f"{number}: {tag}{value}" for number, (tag, value) in enumerate(values))
    with suppress(yaml.YAMLError, UnicodeDecodeError):
        read_yaml(text.encode())


@pytest.mark.parametrize("text", [YAML, YAML.replace("60000", "0"), YAML.replace("admin: true", "weight: 2")])
def test_a_long_key_file_is_read_in_a_process_of_its_own_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)

    def read(by: Callable[[Path], object]) -> object:
        try:
            return by(path)
        except KeyFileError as error:
            return error.message

    here = read(read_tenants)
    monkeypatch.setattr(read_beside, "SHORT", 0)
    monkeypatch.setattr(key_file, "read_tenants", lambda path: pytest.fail("it is read here"))
    assert read(read_tenants_beside) == here


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"missing.yaml cannot be read: No such file"):
        read_tenants(tmp_path / "missing.yaml")


async def test_a_key_file_is_reread_when_it_changes_and_ignored_while_it_is_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(followed_file, "LOOK_SECONDS", 0.001)
    path = tmp_path / "keys.json"

    def write(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(path)

    def document(key: str, **limits: int) -> str:
        return json.dumps({"tenants": {"acme": {"keys": [hashed(key)], **limits}}})

    async def until(works: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not works():
                await asyncio.sleep(0.001)

    def known(key: str) -> bool:
        with suppress(UnauthenticatedError):
            return bool(file.keys.tenant(key))
        return False

    write(document("old"))
    file = KeyFile(path)
    acme = file.keys.tenant("old")
    acme.begin(0.0)
    following = asyncio.create_task(file.follow())
    for wrong in ("{", "tenants: 2026-02-30"):
        write(wrong)
        await until(lambda wrong=wrong: file._file.seen == file._file.state())
        await asyncio.sleep(0.05)
        assert known("old") and not following.done()
    write(document("new", max_requests=1))
    await until(lambda: known("new"))
    assert not known("old") and file.keys.tenant("new") is acme
    with pytest.raises(RateLimitedError):
        acme.begin(0.0)
    following.cancel()


def test_the_key_file_and_the_hash_command_in_the_docs_work(tmp_path: Path):
    page = Path("docs/api-keys.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (tmp_path / "keys.yaml").write_text(example)
    shown = Keys(read_tenants(tmp_path / "keys.yaml"))
    assert shown.tenant("the key of acme").may_use("acme/first")
    assert shown.administrator("the key of the operator").name == "operator"
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[0]
    assert printed == hashed("the key of acme") and printed in example
