"""The catalog's tables. Knows no rules, and no database in particular.

    adapters 1─* versions 1─* version_files *─1 blobs        events: by name, with its beginning
           1─* aliases *─1 versions 1─? tasks, 1─? desired   counted in gone_events once it goes
    reservations: uploads under way                          api_keys: who may call

A deleted adapter's row stays (`deleted_at`), so that its numbers are never given again.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    insert,
    select,
)

from quickchange_adapters.errors import StoreUnavailable

SCHEMA_VERSION = 1
# 64 bits everywhere; SQLite numbers rows by itself only where the type is called INTEGER.
Whole = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

# One row. Its number grows with every change, so that other processes can ask for news.
catalog_state = Table("catalog_state", metadata, Column("revision", Whole, nullable=False))

adapters = Table(
    "adapters",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(63), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("tags", Text, nullable=False),
    Column("next_version", Whole, nullable=False),
    Column("revision", Whole, nullable=False),
    Column("created_at", Whole, nullable=False),
    Column("deleted_at", Whole),
    UniqueConstraint("tenant", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("number", Whole, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("base_name", Text, nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("peft_type", String(32), nullable=False),
    Column("ranks", Text, nullable=False),
    Column("target_modules", Text, nullable=False),
    Column("report", Text, nullable=False),
    Column("created_at", Whole, nullable=False),
    UniqueConstraint("adapter_id", "number"),
    Index("versions_digest", "digest"),
)

version_files = Table(
    "version_files",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("file", String(64), primary_key=True),
    Column("sha256", ForeignKey("blobs.sha256"), nullable=False),
)

# The text of task.json again, beside its blob, so that resolving a name opens no file.
tasks = Table(
    "tasks",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("text", Text, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey("adapters.id"), primary_key=True),
    Column("alias", String(32), primary_key=True),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
)

# What a version is to be wherever the catalog is followed; no row: nothing in particular.
desired = Table(
    "desired",
    metadata,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("pinned", Integer, nullable=False),
    Column("merged", Integer, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("num_bytes", Whole, nullable=False),
    Column("num_refs", Whole, nullable=False),
)

reservations = Table(
    "reservations",
    metadata,
    Column("upload_id", String(64), primary_key=True),
    Column("sha256", ForeignKey("blobs.sha256"), primary_key=True),
    Column("created_at", Float, nullable=False),
)

# `scopes` and `adapters` are JSON lists; `adapters` null: not limited to named ones.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("adapters", Text),
    Column("name", String(128), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("created_by", String(64), nullable=False),
    Column("revoked_at", Integer),
    Column("revoked_by", String(64), nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("at", Float, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("name", String(63), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("version", Whole),
    Column("digest", String(64)),
    Column("alias", String(32)),
    Index("events_name", "tenant", "name"),
)

# How many of a name's first events are gone; no row: none.
gone_events = Table(
    "gone_events",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("num_gone", Whole, nullable=False),
)


def create_tables(connection: Connection) -> None:
    """Bring a database to this version, inside a write.

    Raises: StoreUnavailable when a newer version wrote it.
    """
    metadata.create_all(connection)
    found = connection.scalar(select(schema_version.c.version))
    if found is None:
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        connection.execute(insert(catalog_state).values(revision=0))
    elif found > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"the catalog has schema {found}, this program knows {SCHEMA_VERSION}: "
            "use the version that wrote it, or a newer one"
        )
