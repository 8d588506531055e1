"""Keys that are limited to named adapters: what such a caller may name in a request.

It may name its adapters, by whatever version or alias, and nothing else: neither the base, nor a
mix, which names the base and comes as close to it as its weights say. What it may not name is
answered as what is not there, without looking whether it is.
"""

from quickchange_adapters.names import parse_model

from quickchange_server.adapter_lookup import unknown_model
from quickchange_server.api.schemas import GenerationBody
from quickchange_server.errors import Forbidden
from quickchange_server.principal import Principal


def check_model(caller: Principal, model: str) -> None:
    """Refuse a model string that the caller's key does not cover.

    Raises: NotFound (model_not_found).
    """
    ref = parse_model(model)
    if caller.adapters is not None and not (ref and caller.may_name(ref.name)):
        raise unknown_model(model)


def check_models(caller: Principal, body: GenerationBody) -> None:
    """Refuse a request for what the caller's key does not cover. Raises: NotFound."""
    check_model(caller, body.model)
    for part in body.adapters or ():
        check_model(caller, part.model)


def check_upload(caller: Principal, name: str) -> None:
    """Refuse an upload under a name that the caller's key does not cover.

    Raises: Forbidden; it says nothing of whether the name is taken.
    """
    if not caller.may_name(name):
        names = ", ".join(sorted(caller.adapters or ()))
        raise Forbidden(f"this API key may upload only: {names}", param="name")
