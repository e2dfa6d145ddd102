"""Names that may be a local path or an id of the Hugging Face hub, and a hub that is out of reach."""

import functools
import logging
import os
import re
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LOCAL_FOLDERS = ("runs", "data")
"""Where this package's recipes write runs and read manifests: no owner on the hub."""
SECONDS = 5.0


def is_hub_id(name: str) -> bool:
    """Whether `name`, which does not exist here, can be an id owner/name of the hub.

    It is a path that is missing when it begins with `.`, `/` or `~`, has more than one slash, or begins with
    a folder that exists in the working directory or belongs to runs and manifests.
    """
    if not HUB_ID.fullmatch(name):
        return False
    first = name.partition("/")[0]
    return first not in LOCAL_FOLDERS and not Path(first).is_dir()


@functools.cache
def ask_the_hub() -> None:
    """Asks once a process whether the hub can be reached. Where it cannot, its client is set offline, as by
    HF_HUB_OFFLINE=1: it then takes what has been downloaded and fails at once for the rest.

    By itself the client tries again for 25 seconds, for each file, before it says that there is no network.
    Call it before anything of the hub is loaded.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of requests, httpx or its successor, by the client's version: no answer
        logger.warning("%s does not answer (%s): only downloaded files are used", constants.ENDPOINT, error)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes and libraries that start later
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
