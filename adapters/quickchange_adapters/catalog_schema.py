"""The catalog's tables, and how its database is opened. Knows no rules.

    adapters 1─* versions 1─* version_files *─1 blobs        events: append only, by name
           1─* aliases *─1 versions 1─? tasks                reservations: uploads under way
    api_keys: who may call

A deleted adapter's row stays (`deleted_at`), so that its numbers are never given again.
"""

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.engine.interfaces import DBAPIConnection

from quickchange_adapters.errors import StoreUnavailable

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

# One row. Its number grows with every change, so that other processes can ask for news.
catalog_state = Table("catalog_state", metadata, Column("revision", Integer, nullable=False))

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(63), nullable=False),
    Column("visibility", String(16), nullable=False),
    Column("tags", Text, nullable=False),
    Column("next_version", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("deleted_at", Integer),
    UniqueConstraint("tenant", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("base_name", Text, nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("peft_type", String(32), nullable=False),
    Column("ranks", Text, nullable=False),
    Column("target_modules", Text, nullable=False),
    Column("report", Text, nullable=False),
    Column("created_at", Integer, nullable=False),
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

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("num_bytes", Integer, nullable=False),
    Column("num_refs", Integer, nullable=False),
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
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("name", String(63), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("version", Integer),
    Column("digest", String(64)),
    Column("alias", String(32)),
    Index("events_name", "tenant", "name"),
)


def open_database(url: str) -> Engine:
    """Open a database and bring its tables to this version.

    Raises: StoreUnavailable when a newer version wrote it; SQLAlchemy's own errors.
    """
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin)
    with engine.connect().execution_options(is_write=True) as connection, connection.begin():
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
    return engine


def _prepare_sqlite(connection: DBAPIConnection, record: object) -> None:
    """Make a commit mean that the rows are on the disk, and readers not wait for writers."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    """Take the write lock at the start of a write, so that what it read stays true."""
    is_write = connection.get_execution_options().get("is_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")
