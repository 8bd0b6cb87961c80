"""Uploads of finished folders to the Hub by the huggingface_hub client: checked before any work, private unless asked, resumable.

What may fail is asked first (login, kind of token, name, visibility), so that nobody merges 8 billion weights to learn that he is
not logged in. The upload is one commit: files that have arrived are not sent again, so a run after a dropped connection goes
on. Errors are one line and never hold the token.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from .. import models
from ..errors import LemoError
from .lemo_files import CONFIG_FILE, PREDICTORS_FILE

logger = logging.getLogger(__name__)

# The client's errors below HTTP (connection refused, dropped, timed out); its name changed hands between the client's versions.
_TRANSPORT_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_ATTEMPTS = 3
# A new repository holds this one.
_HUB_FILES = {".gitattributes"}
# What an earlier export may have left in a repository, and would be loaded beside or before the new files.
_EXPORTED_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    CONFIG_FILE,
    PREDICTORS_FILE,
    *(path.name for path in Path(str(models.__file__)).parent.glob("*.py")),
)


@dataclass(frozen=True)
class Repository:
    """A model repository that may be written to.

    Args:
        repo_id: "USER/NAME".
        exists: Whether it is there already.
        public: Whether everybody may read it.
    """

    repo_id: str
    exists: bool
    public: bool


def required_token(token: str | None = None) -> str:
    """The given token, or that of this machine's login.

    Raises:
        LemoError: If there is none.
    """
    found = token or get_token()
    if not found:
        raise LemoError("pushing to the Hub needs a login; no token on this machine; run `hf auth login`, or set HF_TOKEN")
    return found


def writable_repository(name: str, public: bool = False, update: bool = False) -> Repository:
    """Asks the Hub whether a folder can be pushed under `name`; changes nothing.

    Args:
        name: "USER/NAME", or "NAME" for the user who is logged in.
        public: Make the repository public.
        update: Add a commit to a repository that holds files already.

    Raises:
        LemoError: If nobody is logged in, the token may not write, the name is taken, or the visibility is another one.
    """
    token = required_token()
    api = HfApi(library_name="lemo_hf")
    with one_line_hub_errors(name, token):
        user = api.whoami(token=token)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise LemoError(f"the token may only read; {name!r}; log in with a token that may write: `hf auth login`")
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        try:
            found = api.model_info(repo_id, token=token)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return Repository(repo_id, exists=False, public=public)
    files = {each.rfilename for each in found.siblings or []} - _HUB_FILES
    if files and not update:
        raise LemoError(
            f"name is taken; {repo_id!r} holds {len(files)} files; choose another name, or add --update to replace them by a commit"
        )
    if public == bool(found.private):
        now, fix = ("private", "leave out --public") if public else ("public", "add --public")
        raise LemoError(f"repository is {now}; {repo_id!r}; {fix}, or change its visibility on its page")
    return Repository(repo_id, exists=True, public=public)


def push_folder(folder: str | Path, repository: Repository) -> str:
    """Uploads a folder as one commit, into a repository that is made if need be; returns its address.

    A connection that drops is taken up again a few times; files that have arrived stay.

    Raises:
        LemoError: If it cannot be done; the folder is untouched, and pushing it again goes on from there.
    """
    repo_id, token = repository.repo_id, required_token()
    api = HfApi(library_name="lemo_hf")
    again = f"lemo export {folder} --push {repo_id}{' --public' if repository.public else ''}"
    with one_line_hub_errors(repo_id, token, f"{str(folder)!r} is complete: go on with `{again}`"):
        if not repository.exists:
            api.create_repo(repo_id, private=not repository.public, token=token)
        for attempt in range(_ATTEMPTS):
            try:
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=str(folder),
                    commit_message="Upload by lemo export",
                    delete_patterns=list(_EXPORTED_FILES) if repository.exists else None,
                    token=token,
                )
                break
            except (_TRANSPORT_ERROR, OSError, RuntimeError) as error:
                if attempt + 1 == _ATTEMPTS or not _may_pass(error):
                    raise
                logger.warning("upload was interrupted (%s); going on with it", _reason(error).replace(token, "<token>"))
                time.sleep(2**attempt)
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def one_line_hub_errors(name: str, token: str | None, fix: str = "try again later") -> Iterator[None]:
    """Turns what the client raises into a `LemoError` of one line without the token.

    Args:
        name: The repository.
        token: The token in use.
        fix: What to do where the fault is the Hub's or the network's.
    """
    try:
        yield
    except LemoError:
        raise
    except (_TRANSPORT_ERROR, OSError, RuntimeError, ValueError) as error:
        # No chain: an upstream error may quote headers.
        raise LemoError(hub_error(error, name, token, fix)) from None


def hub_error(error: BaseException, name: str, token: str | None, fix: str) -> str:
    """One line on what went wrong, `fact; value; fix`; arguments as in [`one_line_hub_errors`]."""
    answers = [each for each in _chain(error) if isinstance(each, HfHubHTTPError)]
    if isinstance(error, HFValidationError):
        fact, fix = "name is none that the Hub takes", "write USER/NAME, in letters, digits, '-', '_' and '.'"
    elif isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        # What the client makes of an answer (a card whose metadata are refused) says more than the answer.
        fact = f"it could not be pushed ({' '.join(str(error).split())[:200]})"
    elif answers:
        status = answers[0].response.status_code
        fact, fix = {
            401: ("the Hub does not accept the token (401)", "log in anew with `hf auth login`; a token in HF_TOKEN goes first"),
            403: ("the token may not write there (403)", "use a token that may, or a name under a user or organisation of yours"),
            404: ("repository does not exist, or the token may not see it (404)", "check the name"),
            409: ("name is taken (409)", "choose another name"),
        }.get(status, (f"the Hub answers {status} ({answers[0].server_message or _reason(answers[0])})", fix))
    elif isinstance(error, OfflineModeIsEnabled):
        fact, fix = "the Hub is switched off", "unset HF_HUB_OFFLINE"
    elif _is_transport(error):
        fact = f"the Hub cannot be reached ({_reason(error)})"
    else:
        fact = f"it could not be pushed ({_reason(error)})"
    line = " ".join(f"{fact}; {name!r}; {fix}".split())
    return line.replace(token, "<token>") if token else line


def _chain(error: BaseException) -> Iterator[BaseException]:
    # The client wraps the failure of one file in an error of its own.
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _is_transport(error: BaseException) -> bool:
    # A thread that finds the Hub gone closes the client, so another one's upload ends in an error about that: closed, or no more.
    gone = ("client has been closed", "'NoneType' object has no attribute 'request'")
    return any(
        isinstance(each, _TRANSPORT_ERROR | ConnectionError | TimeoutError) or any(words in str(each) for words in gone)
        for each in _chain(error)
    )


def _may_pass(error: BaseException) -> bool:
    answers = [each for each in _chain(error) if isinstance(each, HfHubHTTPError)]
    return answers[0].response.status_code >= 500 if answers else _is_transport(error)


def _reason(error: BaseException) -> str:
    *_, last = _chain(error)
    return " ".join(str(last).split())[:200] or type(last).__name__
