"""The API keys that the server knows, and what each of their holders may do.

Laws:
1. A key is kept as its SHA-256 digest; no message, log line or repr holds a key.
2. `find` compares with every key, whichever of them matches.
3. `reload` takes over all of the file, or none of it; requests that were let in go on.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from server.config import OptionError, is_loopback, parse_yaml
from server.options import ServerConfig

logger = logging.getLogger(__name__)

HASHED = "sha256:"
"""What begins a key that is given as the SHA-256 of its UTF-8 bytes, in hexadecimal."""
YAML_SUFFIXES = (".yaml", ".yml", ".json")
LOWEST_PRIORITY_NUMBER = -(2**63)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant may use; None: as much as there is."""

    max_sequences: int | None = None
    """In flight at a time."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever shares limits, cached prefixes, files and a place in the queue: the holder of some keys, or
    everybody where the server asks for none."""

    id: str = ""
    limits: Limits = Limits()
    least_priority: int = LOWEST_PRIORITY_NUMBER
    """The lowest `priority`, which is the most urgent, that its requests may have."""
    is_admin: bool = False


class KeyRing:
    """Belongs to no thread: what `find` reads is replaced as a whole."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises OptionError for keys that cannot be used."""
        self._config = config
        self._tenants = _load(config)
        self.anonymous = Tenant(limits=_default_limits(config))
        """Who comes without a key, where none is asked for."""

    @property
    def is_needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._tenants)

    @property
    def num_tenants(self) -> int:
        return len({tenant.id for tenant in self._tenants.values()})

    @property
    def has_admin(self) -> bool:
        return any(tenant.is_admin for tenant in self._tenants.values())

    def find(self, key: bytes) -> Tenant | None:
        """Whose key it is."""
        given = hashlib.sha256(key).digest()
        found = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        # Not even where it is configured, which a half-set environment variable may do.
        return found if key else None

    def reload(self) -> None:
        """Read the file again; one that cannot be used changes nothing."""
        try:
            tenants = _load(self._config)
        except OptionError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        self._tenants = tenants
        logger.info("%d API keys are in use", len(tenants))


def check_exposure(config: ServerConfig, keys: KeyRing) -> None:
    """Raises OptionError if others than this machine's users could use the server without a key."""
    if keys.is_needed or config.allow_unauthenticated or is_loopback(config.host):
        return
    raise OptionError(
        f"--host {config.host} lets other machines in, and no API key is asked for: name a file of keys with "
        "--api-key-file, or a key in GEMMA_SERVER_API_KEY, or say --allow-unauthenticated (in a container, "
        "GEMMA_SERVER_ALLOW_UNAUTHENTICATED=true) if something in front of the server checks who asks."
    )


class _Entry(BaseModel):
    """One tenant in the file. A limit that is not named is the default one; null is none."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"), strict=True
    )

    # Names become part of identifiers, in which a slash separates them from what clients choose.
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    keys: list[str] = Field(min_length=1)
    max_sequences: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    least_priority: int = Field(0, ge=LOWEST_PRIORITY_NUMBER, lt=2**63)
    admin: bool = False


_entries = TypeAdapter(list[_Entry])


def _load(config: ServerConfig) -> dict[bytes, Tenant]:
    """The tenants of all keys, by digest. Raises OptionError."""
    tenants = dict(_unnamed(config.api_key, "--api-key", config))
    path = config.api_key_file
    if path is None:
        return tenants
    where = f"--api-key-file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"{where}: {reason}") from None
    found = list(_named(text, where, config) if path.suffix in YAML_SUFFIXES else _lines(text, where, config))
    if not found:
        raise OptionError(f"{where}: it holds no key")
    if len({digest for digest, _ in found} | tenants.keys()) < len(found) + len(tenants):
        raise OptionError(f"{where}: a key is there twice, or is given with --api-key, too")
    return tenants | dict(found)


def _lines(text: str, where: str, config: ServerConfig) -> Iterator[tuple[bytes, Tenant]]:
    lines = (line.strip() for line in text.splitlines())
    return _unnamed([line for line in lines if line and not line.startswith("#")], where, config)


def _unnamed(keys: list[str], where: str, config: ServerConfig) -> Iterator[tuple[bytes, Tenant]]:
    """Keys alone: each is a tenant of its own."""
    for key in keys:
        digest = _digest(key, where)
        yield digest, Tenant(digest.hex(), _default_limits(config), least_priority=0)


def _named(text: str, where: str, config: ServerConfig) -> Iterator[tuple[bytes, Tenant]]:
    try:
        entries = _entries.validate_python(parse_yaml(text, where))
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        # Where a name of a field is wrong it may be a key that is in the wrong place.
        parts = [
            part for part in problem["loc"] if isinstance(part, int) or problem["type"] != "extra_forbidden"
        ]
        at = ".".join(str(part) for part in parts)
        raise OptionError(f"{where}: {at}: {problem['msg']}" if at else f"{where}: {problem['msg']}") from None
    if len({entry.name for entry in entries}) < len(entries):
        raise OptionError(f"{where}: two entries have one name")
    for entry in entries:
        tenant = Tenant(f"name:{entry.name}", _limits(entry, config), entry.least_priority, entry.admin)
        yield from ((_digest(key, where), tenant) for key in entry.keys)


def _digest(key: str, where: str) -> bytes:
    if not key.startswith(HASHED):
        try:
            return hashlib.sha256(key.encode()).digest()
        except UnicodeEncodeError:
            raise OptionError(f"{where}: a key holds half a surrogate pair") from None
    try:
        digest = bytes.fromhex(key.removeprefix(HASHED))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise OptionError(f"{where}: {HASHED!r} must be followed by 64 hexadecimal digits")
    return digest


def _default_limits(config: ServerConfig) -> Limits:
    return Limits(config.max_sequences_per_key, config.requests_per_minute, config.tokens_per_minute)


def _limits(entry: _Entry, config: ServerConfig) -> Limits:
    default, given = _default_limits(config), entry.model_fields_set
    return Limits(
        *(
            getattr(entry if name in given else default, name)
            for name in ("max_sequences", "requests_per_minute", "tokens_per_minute")
        )
    )
