"""Runs and heads on the Hugging Face hub: `hub://owner/name`, taken into the runs folder."""

import fnmatch
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from kanllama_lightning.console.entry import DISK, error_number
from kanllama_lightning.errors import InputError
from kanllama_lightning.runs.folder import make_folder
from kanllama_lightning.storage.small_files import there

log = logging.getLogger(__name__)

SCHEME = "hub://"
ADDRESS = re.compile(r"hub://([\w.-]+/[\w.-]+)((?:/[\w.=+-]+)*?)/?(?:@([\w./-]+))?", re.ASCII)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
NO_HUB = (ValueError, KeyError, TypeError, AttributeError)
"""What the hub's library raises where something answers that is no hub: a page to log in, say."""
TAKEN = ("*.json", "*.safetensors", "*.csv", "*.yaml", "*.yml", "ae.pt")
"""Files that are taken: tensors, tables and settings, and no code."""
HEADS = ("head.json", "cfg.json", "ae.pt")
"""By these a folder is known to hold a head, of ours or of another project."""
TIMEOUT_S = 8
LARGE = 1 << 30
"""Bytes from which on the size is said before they are fetched."""


class Address(NamedTuple):
    """What `hub://owner/name/folder@revision` means."""

    repository: str
    folder: str
    """Within it; "" for its top."""
    revision: str | None

    @property
    def local(self) -> str:
        """The name of its folder among the runs."""
        parts = [self.repository, *([self.folder] if self.folder else [])]
        name = "--".join("--".join(part.split("/")) for part in parts)
        return name + (f"@{self.revision.replace('/', '--')}" if self.revision else "")


def misnamed(repository: str) -> str:
    """Why the hub has no repository of this name, OWNER/NAME; "" if it may have one."""
    if repository.count("/") != 1:
        return "it is not an owner and a name" if "/" in repository else "it has no owner"
    if REPOSITORY.fullmatch(repository) is None:
        return "letters a to z, digits, '-', '_' and '.' may be in it"
    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        return " ".join(str(e).split())[:200].rstrip(".")
    return ""


def parsed(name: str, argument: str) -> Address:
    """The address meant; raises InputError where it is none."""
    found = ADDRESS.fullmatch(name)
    folder = found[2].strip("/") if found else ""
    parts = re.split("[/@]", name.removeprefix(SCHEME))
    why = misnamed(found[1]) if found is not None else ""
    if found is None or why or any(part in (".", "..") for part in parts):
        raise InputError(
            f"{argument}={name!r:.200}: no address on the hub{why and f' ({why})'}; give "
            "hub://OWNER/NAME, with the folder of one SAE and with a revision where that is "
            "needed: hub://OWNER/NAME/FOLDER@REVISION"
        )
    return Address(found[1], folder, found[3])


def fetched(name: str, runs_dir: str, argument: str) -> Path:
    """The folder among the runs that a head on the hub is fetched into.

    What is there already is not fetched again; a download that was interrupted goes on.

    Args:
        name: `hub://OWNER/NAME`, and what `Address` says.
        runs_dir: Where runs lie.
        argument: What was given, for messages.

    Raises:
        InputError: There is no such head, it may not be read, or the hub cannot be reached.
    """
    address = parsed(name, argument)
    target = Path(runs_dir) / address.local
    own = target / address.folder
    try:
        return _fetched(address, target, name, argument)
    except _Unreachable as e:
        if any(there(own / one) for one in HEADS):
            log.info("the hub cannot be reached (%s): using %s", e, own)
            return own
        raise InputError(
            f"{argument}={name!r}: the hub cannot be reached ({e}); fetch it where there is a "
            "network, and give the folder"
        ) from e


def _fetched(address: Address, target: Path, name: str, argument: str) -> Path:
    with _explained(name, argument):
        info = HfApi().model_info(
            address.repository, revision=address.revision, files_metadata=True, timeout=TIMEOUT_S
        )
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
    prefix = f"{address.folder}/" if address.folder else ""
    _check_holds_one(name, argument, address, list(sizes), prefix)
    inside = [file for file in sizes if file.startswith(prefix)]
    # SAEs in folders of their own are asked for by their folders
    flat = [file for file in inside if "/" not in file[len(prefix) :]]
    wanted = [file for file in flat if any(fnmatch.fnmatch(Path(file).name, p) for p in TAKEN)]
    total = sum(sizes[file] for file in wanted)
    if total >= LARGE:
        log.info("fetching %.1f GiB of %s", total / (1 << 30), name)
    make_folder(target, "folder", "--runs_dir FOLDER")
    with _explained(name, argument):
        snapshot_download(
            address.repository, revision=info.sha, local_dir=target, allow_patterns=wanted
        )
    log.info("%s at commit %s is in %s", name, info.sha, target / address.folder)
    return target / address.folder


def _check_holds_one(
    name: str, argument: str, address: Address, files: Sequence[str], prefix: str
) -> None:
    if any(f"{prefix}{one}" in files for one in HEADS):
        return
    below = sorted({
        str(Path(file).parent)
        for file in files
        if file.startswith(prefix) and Path(file).name in HEADS
    })  # fmt: skip
    if below:
        listed = ", ".join(f"{SCHEME}{address.repository}/{one}" for one in below[:3])
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        raise InputError(
            f"{argument}={name!r}: holds {len(below)} of them, each in a folder of its own; give "
            f"one: {listed}{more}"
        )
    raise InputError(
        f"{argument}={name!r}: holds no head of ours and no SAE of SAELens, sparsify or "
        f"dictionary_learning (no {', '.join(HEADS)})"
    )


class _Unreachable(Exception):  # noqa: N818
    """There is no answer from the hub."""


@contextmanager
def _explained(name: str, argument: str) -> Iterator[None]:
    """Turn what the hub's library raises into one message."""
    try:
        yield
    except HfHubHTTPError as e:
        code = getattr(e.response, "status_code", None)
        said = " ".join(str(e).split())[:300]
        if code in (401, 403, 404):
            raise InputError(
                f"{argument}={name!r}: the hub does not give it out ({code}): it is misspelt, "
                "private, or its terms were not accepted; log in once with `hf auth login`"
            ) from e
        raise InputError(f"{argument}={name!r}: the hub answers {code}: {said}") from e
    except (LocalEntryNotFoundError, OSError, httpx2.HTTPError, *NO_HUB) as e:
        if error_number(e) in DISK:
            raise  # of the place that it is fetched to
        raise _Unreachable(" ".join(str(e).split())[:200]) from e
