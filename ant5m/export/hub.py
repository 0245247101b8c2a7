"""The Hugging Face hub: pushing a folder, and fetching what was pushed. Its errors become one line each.

A token is only ever read by huggingface_hub; no message of it is passed on, so none can show a token.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ant5m.errors import UserError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"


class HubUnreachable(UserError):
    """No fault of the user's: no connection, a time-out, too many requests, a failure over there."""


def api() -> Any:
    """The client; tests put another in its place."""
    from huggingface_hub import HfApi

    return HfApi(library_name="ant5m")


def hide_progress() -> None:
    """No progress bars of the client from now on: beside a training they would break up its own."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def check_name(repo: str) -> None:
    """Raise `UserError` unless `repo` is OWNER/NAME as the hub allows it."""
    good = isinstance(repo, str) and len(repo) <= 96 and re.fullmatch(f"{_PART}/{_PART}", repo)
    if not good or ".." in repo or "--" in repo:
        raise UserError(f"{repo!r} is not the name of a repository on the hub: OWNER/NAME, as ada/ants-5m")


def create(repo: str, private: bool = True) -> str:
    """Make the model repository where it is not there yet; returns its address."""
    check_name(repo)
    with _readable(repo):
        return str(api().create_repo(repo, private=private, exist_ok=True))


def push(folder: Path, repo: str, place: str = "", delete: str | None = None) -> None:
    """Upload a folder into one folder of a repository, in one commit: all of it is there, or nothing.

    `delete`: a pattern of what to remove there in the same commit unless it is uploaded again.
    """
    with _readable(repo):
        api().upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            path_in_repo=place or None,
            commit_message="Upload by ant5m",
            delete_patterns=delete,
        )


def fetch(repo: str, place: str, folder: Path) -> None:
    """Download one folder of a repository to `folder`/`place`."""
    check_name(repo)
    with _readable(repo):
        api().repo_info(
            repo
        )  # without a connection, the next call only warns and returns what lies in `folder`
        api().snapshot_download(repo, allow_patterns=f"{place}/**", local_dir=str(folder))


def has(repo: str, file: str) -> bool:
    """Whether a repository is there, may be read, and has this file."""
    check_name(repo)
    with _readable(repo):
        return bool(api().file_exists(repo, file))


@contextlib.contextmanager
def _readable(repo: str) -> Iterator[None]:
    """What the client raises, in one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise UserError(_NO_LOGIN) from None
    except errors.OfflineModeIsEnabled:
        raise HubUnreachable("the hub is switched off by HF_HUB_OFFLINE: unset it") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise _explained(repo, status) from None
    except errors.HFValidationError:
        raise UserError(f"{repo!r} is not the name of a repository on the hub: OWNER/NAME") from None
    except Exception as error:  # of the client's own HTTP library, which changes: requests, httpx, httpx2
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        raise HubUnreachable(f"the hub cannot be reached ({type(error).__name__}): try again later") from None


_NO_LOGIN = "you are not logged in to the hub: run `hf auth login`, or set HF_TOKEN"


def _explained(repo: str, status: int | None) -> UserError:
    if status == 401:
        return UserError(f"{_NO_LOGIN} (or {repo} does not exist, or is private)")
    if status == 403:
        return UserError(f"you may not write to {repo}: take another owner, or a token that may write")
    if status == 404:
        return UserError(f"{repo} is not on the hub, or is private and you may not read it")
    if status == 409:
        return UserError(f"the name {repo} is taken: choose another one")
    if status == 429:
        return HubUnreachable("the hub refuses more requests for now (429): try again later")
    return HubUnreachable(f"the hub failed ({status or 'no answer'}): try again later")
