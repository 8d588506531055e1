"""A base that this engine cannot run."""

from quickchange_server.errors import QuickchangeError


class UnsupportedBase(QuickchangeError):
    """This checkpoint cannot be served; the message says why."""

    code = "unsupported_base"
