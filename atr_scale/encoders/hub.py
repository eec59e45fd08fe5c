"""Whether a model hub has a model's files, found out in seconds."""

from __future__ import annotations

from pathlib import Path

from atr_scale.errors import UserError, one_line

HUB_TIMEOUT = 5.0  # seconds, for the first answer


def must_use_cache(place: str) -> bool:
    """Whether the files of a transformers model come from the hub's cache, because the hub cannot be reached; False for
    a folder.

    One request decides, without the retries of most of a minute that loading a model would make.
    Raises UserError if the hub has no such model, or if it cannot be reached and nothing of the model is in its cache.
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
    except Exception as error:  # each version of the library has its own types of network errors
        if isinstance(try_to_load_from_cache(place, "config.json"), str):
            return True
        reason = one_line(error)
        raise UserError(
            f"no folder '{place}', no model '{place}' in the cache, and {hub} cannot be asked for it ({reason}): "
            "give a folder with config.json, weights and tokenizer files, or a model's name where a hub can be reached"
        ) from None
    return False
