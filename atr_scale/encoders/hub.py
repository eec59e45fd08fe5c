"""Whether a model hub can be reached and has a model, with an answer within seconds."""

from __future__ import annotations

from pathlib import Path

from atr_scale.errors import UserError, one_line

HUB_TIMEOUT = 5.0  # seconds, for the first answer


def must_use_cache(place: str) -> bool:
    """Whether the files of a transformers model must come from the local cache because the hub cannot be reached.

    It is False for a folder. One request decides; loading a model would retry for most of a minute.
    Raises UserError if the hub has no such model, or if it cannot be reached and the model is not in the cache.
    """
    if Path(place).is_dir():
        return False
    # Only models with a name on a hub need this library.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    hub = constants.ENDPOINT
    try:
        get_hf_file_metadata(hf_hub_url(place, "config.json"), timeout=HUB_TIMEOUT)
    except HFValidationError:
        raise UserError(f"'{place}' is neither a folder nor a model's name on a hub: give one of the two") from None
    except GatedRepoError:
        raise UserError(f"no access to '{place}' on {hub}: ask for it there, then call `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"no model '{place}' on {hub}: give the name of one that it has, or a folder") from None
    except EntryNotFoundError:
        raise UserError(f"'{place}' on {hub} has no config.json: give a model of transformers") from None
    except Exception as error:  # the types of network errors differ between versions of the library
        if isinstance(try_to_load_from_cache(place, "config.json"), str):
            return True
        reason = one_line(error)
        raise UserError(
            f"no folder '{place}', no model '{place}' in the cache, and {hub} cannot be asked for it ({reason}): "
            "give a folder with config.json, weights and tokenizer files, or a model's name where a hub can be reached"
        ) from None
    return False
