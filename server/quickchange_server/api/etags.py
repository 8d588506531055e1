"""Entity tags that callers send back (RFC 9110, section 13.1.2). Knows no adapters."""


def is_known(if_none_match: str | None, etag: str) -> bool:
    """Whether the caller has what `etag` stands for, and needs no copy of it."""
    if if_none_match is None:
        return False
    known = (each.strip() for each in if_none_match.split(","))
    return any(each == "*" or each.removeprefix("W/") == etag for each in known)
