"""Upload what was converted to huggingface.co or modelscope.cn, with their own clients.

Tokens are where those clients keep them (`hf auth login` or HF_TOKEN, `modelscope login` or MODELSCOPE_API_TOKEN); they
are not read here. Other addresses, such as a mirror: HF_ENDPOINT, MODELSCOPE_ENDPOINT.
"""

import contextlib
import glob
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from common.flags import is_installed, non_empty

from .model_card import Address, local_name

PACKAGES = {"huggingface": "huggingface_hub", "modelscope": "modelscope_hub"}
LOGIN = {
    "huggingface": "hf auth login, or set HF_TOKEN",
    "modelscope": "modelscope login --token TOKEN, or set MODELSCOPE_API_TOKEN",
}
COMMANDS = {"huggingface": "hf upload", "modelscope": "modelscope upload"}
ENDPOINTS = {"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}
MESSAGE = "Upload a MiniMind"
MADE_BY_HUBS = {".gitattributes", "README.md", "configuration.json"}  # in a repository that is still empty


class HubError(ValueError):
    """Why nothing was uploaded, in plain words."""


def add_push_flags(parser) -> None:
    """The flags of an upload."""
    group = parser.add_argument_group("upload", "what was written, after it was compared")
    group.add_argument("--push", type=non_empty, metavar="OWNER/NAME", help="to this repository, made if it is new")
    group.add_argument("--hub", choices=PACKAGES, default="huggingface", help="of which hub (%(default)s)")
    group.add_argument(
        "--license", type=non_empty, metavar="ID",
        help="for the model card of a folder, as the hub spells it, e.g. apache-2.0; without it, left open there",
    )  # fmt: skip
    group.add_argument("--private", action="store_true", help="only you can see the repository")
    group.add_argument("--replace", action="store_true", help="replace what the repository holds")


def push_problems(args: Namespace) -> list[str]:
    """What is wrong with these flags."""
    problems = []
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        problems.append(f"--push {args.push}: must be OWNER/NAME, e.g. me/MiniMind2-Small")
    if args.license and not re.fullmatch(r"[a-z0-9.-]+", args.license):
        problems.append(f"--license {args.license}: must be an identifier of the hub, e.g. apache-2.0, mit, cc-by-4.0")
    if args.license and args.to != "transformers":
        problems.append(f"--license {args.license}: only a folder has a model card; leave it out")
    if args.push and not is_installed(PACKAGES[args.hub]):
        problems.append(f"--push: the package is missing; pip install {PACKAGES[args.hub]}")
    if not args.push and (args.private or args.replace):
        problems.append("--private and --replace are about --push OWNER/NAME: add it, or leave them out")
    return problems


def check_upload(hub: str, repo_id: str, names: list[str] | None, private: bool, replace: bool) -> None:
    """Everything that can be known before a model is converted; changes nothing on the hub.

    Args:
        hub: "huggingface" or "modelscope".
        repo_id: "owner/name".
        names: of the files to come; None for a folder, which is to be all that the repository holds.
        private: the repository must not be visible to others.
        replace: what stands in the way there may go.

    Raises:
        HubError: no token or a wrong one, a repository that holds something else or is public, or no connection.
    """
    with _plain_errors(hub, repo_id):
        found = _find_huggingface(repo_id) if hub == "huggingface" else _find_modelscope(repo_id)
    if found is None:
        return
    is_private, files = found
    if private and not is_private:
        raise HubError(f"{repo_id} is there and public: make it private in its settings, or choose another name")
    in_the_way = sorted(files - MADE_BY_HUBS if names is None else files & set(names))
    if in_the_way and not replace:
        shown = ", ".join(in_the_way[:4]) + (f" and {len(in_the_way) - 4} more" if len(in_the_way) > 4 else "")
        raise HubError(
            f"{repo_id} holds {shown}: choose another name, or replace {'all' if names is None else 'these'} with "
            "--replace (the hub's history keeps them)"
        )


def upload(hub: str, repo_id: str, path: Path, beside: list[Path], *, private: bool, replace: bool) -> str:
    """Make the repository if it is not there, and upload a folder, or a file with those beside it; returns its address.

    Args:
        replace: of a folder: the repository then holds its files and no others.

    Raises:
        HubError: the hub refused, or the connection broke. Huggingface takes all files in one commit or none.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path, *(file for file in beside if file.is_file())]
    try:
        with _plain_errors(hub, repo_id):
            send = _send_huggingface if hub == "huggingface" else _send_modelscope
            return send(repo_id, files, private, path.is_dir() and replace)
    except HubError as error:
        later = upload_command(hub, repo_id, files if path.is_file() else [path], private)
        raise HubError(f"not uploaded: {error}. {path} is whole: `{later}` uploads it as it is") from error


def upload_command(hub: str, repo_id: str, paths: list[Path], private: bool) -> str:
    """The client's own command that uploads a folder, or files one after the other, into a repository as asked for."""
    commands = []
    if private and hub == "modelscope":  # its upload would make a public one
        commands.append(f"modelscope create {repo_id} --repo-type model --visibility private --exist-ok")
    for path in paths:
        words = [*COMMANDS[hub].split(), repo_id, str(path)]
        if hub == "huggingface" and path.is_dir():
            words.append(".")
        if private and hub == "huggingface":
            words.append("--private")
        commands.append(shlex.join(words))
    return " && ".join(commands)


def address_of(args: Namespace) -> Address:
    """What the model card of a folder names: the repository if it is uploaded, else the folder."""
    if not args.push:
        return Address(local_name(Path(args.target)), license=args.license)
    folder = args.push.partition("/")[2]
    if args.hub == "huggingface":
        return Address(args.push, f"hf download {args.push} --local-dir {folder}", args.license)
    # transformers looks for OWNER/NAME on huggingface.co alone.
    return Address(folder, f"modelscope download --model {args.push} --local_dir {folder}", args.license)


def _send_huggingface(repo_id: str, files: list[Path], private: bool, is_whole: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    changes = [CommitOperationAdd(file.name, file) for file in files]
    if is_whole:
        others = set(api.list_repo_files(repo_id)) - {".gitattributes", *(file.name for file in files)}
        changes += [CommitOperationDelete(name) for name in sorted(others)]
    api.create_commit(repo_id, changes, commit_message=MESSAGE)
    return str(url)


def _send_modelscope(repo_id: str, files: list[Path], private: bool, is_whole: bool) -> str:
    from modelscope_hub import HubApi, HubConfig

    config = HubConfig()
    api = HubApi(config)
    if not api.repo_exists(repo_id, "model"):
        api.create_repo(repo_id, "model", visibility="private" if private else "public")
    api.upload_folder(
        repo_id,
        "model",
        files[0].parent,
        commit_message=MESSAGE,
        allow_patterns=[glob.escape(file.name) for file in files],
        sync_remote_repo=is_whole,
        use_cache=False,  # it would be a file inside the folder
        disable_tqdm=True,
    )
    return f"{config.endpoint}/models/{repo_id}"


def _find_huggingface(repo_id: str) -> tuple[bool, set[str]] | None:
    """Whether a repository is private, and what it holds; None if there is none. Whoever asks must be logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    api.whoami()
    try:
        found = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        return None
    return bool(found.private), {file.rfilename for file in found.siblings or []}


def _find_modelscope(repo_id: str) -> tuple[bool, set[str]] | None:
    """As `_find_huggingface`."""
    from modelscope_hub import HubApi, HubConfig
    from modelscope_hub.constants import Visibility
    from modelscope_hub.errors import NotExistError

    api = HubApi(HubConfig())
    api.whoami()
    try:
        found = api.get_repo(repo_id, "model")
    except NotExistError:
        return None
    files = {file.path for file in api.list_repo_files(repo_id, "model") if file.type != "tree"}
    return found.visibility == Visibility.PRIVATE, files


@contextlib.contextmanager
def _plain_errors(hub: str, repo_id: str) -> Iterator[None]:
    """What a client raises, as one HubError that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of two clients and of what they speak HTTP with: they have no class in common
        if not type(error).__module__.startswith(("huggingface_hub", "modelscope_hub", "httpx", "requests", "urllib3")):
            raise
        raise HubError(_reason(hub, repo_id, error)) from error


def _reason(hub: str, repo_id: str, error: Exception) -> str:
    name = type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    if name == "LocalTokenNotFoundError" or (name == "AuthenticationError" and status is None):
        return f"there is no token of {hub} on this machine: {LOGIN[hub]}"
    if status == 401:
        return f"{hub} knows no such token (mistyped, revoked or expired): {LOGIN[hub]}"
    if status == 403:
        return (
            f"{hub} does not let this token write to {repo_id}: take one with write access, or a repository of your own"
        )
    if status == 409:
        return f"{hub} says that {repo_id} is there already, or is just being changed: look at it, then try again"
    said = (str(error).strip().splitlines() or [name])[0][:200]
    if status is not None:
        return f"{hub} answers {status} to {repo_id}: {said}"
    return (
        f"no connection to {hub}, or it broke ({name}: {said}): try again later, convert without --push, or set "
        f"{ENDPOINTS[hub]} to a mirror"
    )
