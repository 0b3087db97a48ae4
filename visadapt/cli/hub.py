"""``visadapt push`` and ``pull``: adapters to and from the Hugging Face Hub, whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visadapt.cli.errors import UserError
from visadapt.cli.hub_card import model_card
from visadapt.cli.hub_files import CARD, Bundle, check_taken, collect, size, wanted

MOST = 8 * 2**30  # bytes that are taken; no adapter is so large
_REPO = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def push(place: Path, repo: str, private: bool | None, licence: str | None, dry_run: bool) -> None:
    """Send the adapters of a folder or file, in one commit.

    Args:
        place: Folder of a run or an export, or one adapter file.
        repo: owner/name; it is made if it is not there.
        private: Whether a new repository is private.
        licence: Id of the licence for the card.
        dry_run: Show what would be sent, and send nothing.

    Raises:
        UserError: There is nothing to send, or the Hub refuses it; it is then as it was, but for an empty repository
            that was new.
    """
    _checked(repo)
    hub = _library()
    bundle = collect(place)
    card, notes = model_card(bundle, repo, licence)
    bundle.files = {CARD: card.encode(), **bundle.files}
    _list(bundle, repo, private, notes)
    if dry_run:
        print(f"\n--- {CARD}\n{card}\ndry run: nothing was sent")
        return
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=held if isinstance(held, bytes) else str(held))
        for name, held in bundle.files.items()
    ]
    with _told(repo, writing=True):
        api = _api(hub)
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(repo, "it is there already, and public", "--private is for new ones: change it on the Hub")
        done = api.create_commit(repo, operations, commit_message=f"{bundle.name}: adapter and model card (visadapt)")
    print(f"sent: {done.commit_url}")


def pull(repo: str, revision: str | None, output: Path | None) -> None:
    """Take the adapters of a repository, with what tells of them, into a new folder.

    Args:
        repo: owner/name.
        revision: Branch, tag or commit.
        output: Folder to make; None is the name of the repository.

    Raises:
        UserError: There is no adapter as safetensors, something is in the folder's place, or the Hub refuses;
            nothing is left behind.
    """
    _checked(repo)
    hub = _library()
    output = output or Path(repo.rpartition("/")[2])
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError("--output", f"there is something at '{output}' already", "name a new folder")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with _told(repo):
            api = _api(hub)
            info = api.model_info(repo, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            names = wanted(sizes, repo)
            if (total := sum(sizes[name] for name in names)) > MOST:
                raise UserError(repo, f"{total:,} bytes are no adapter; at most {MOST:,} are taken")
            for name in names:
                api.hf_hub_download(repo, name, revision=info.sha, local_dir=temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the library's notes
        taken = _described(temporary, repo)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output}: {len(names)} files, {total:,} bytes, commit {str(info.sha)[:12]}")
    for file, kind in taken:
        print(f"  {output / file}: {kind}  (visadapt inspect {output / file})")


def _described(folder: Path, repo: str) -> list[tuple[str, str]]:
    """Name and kind of each adapter that was taken."""
    try:
        return [("" if known.path == folder else known.path.name, known.kind) for known in check_taken(folder)]
    except UserError as error:
        raise UserError(f"{repo}: {Path(error.where).name}", error.what, error.hint) from None


def _list(bundle: Bundle, repo: str, private: bool | None, notes: list[str]) -> None:
    """Print what is sent, file by file, and what is not."""
    total = sum(map(size, bundle.files.values()))
    width = max(map(len, bundle.files))
    print(f"{repo}{' (private)' if private else ''}: {len(bundle.files)} files, {total:,} bytes")
    for name, held in bundle.files.items():
        kind = bundle.adapters[name].kind if name in bundle.adapters else ""
        print(f"  {name:<{width}}  {size(held):>12,}  {kind}".rstrip())
    if bundle.left:
        print(f"not sent: {', '.join(bundle.left)}")
    if bundle.shortened:
        print("paths of this machine are cut to their last name in what is sent")
    for note in notes:
        print(f"note: {note}")


# --- the Hub ----------------------------------------------------------------------------
def _checked(repo: str) -> None:
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise UserError(repo, "this should be owner/name, as the Hub calls a repository")


def _library() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("hub", "the Hub needs huggingface_hub", "pip install 'visadapt[hub]'") from error
    return huggingface_hub


def _api(hub: Any) -> Any:
    """The Hub, at HF_ENDPOINT where that is set; the token is the library's affair."""
    from visadapt.cli.main import version

    return hub.HfApi(os.environ.get("HF_ENDPOINT"), library_name="visadapt", library_version=version())


@contextmanager
def _told(repo: str, writing: bool = False) -> Iterator[None]:
    """Errors of the Hub, and of the way to it, as one message, in which no token is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = _explained(error, repo, writing)
        if found is None:
            raise
        raise found from None


def _explained(error: BaseException, repo: str, writing: bool) -> UserError | None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE", "it is set, so the Hub is not asked", "unset it")
    if isinstance(error, RevisionNotFoundError):
        return UserError(repo, "there is no such revision", "--revision takes a branch, a tag or a commit")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and writing:
        return UserError(repo, "the Hub does not know this token, or there is none (401)", LOGIN)
    if status == 403:
        what = "write to it" if writing else "read it"
        return UserError(repo, f"the token may not {what} (403)", "take one with that right")
    if status in (401, 404):
        hint = f"is it spelt so? for a private one {LOGIN}"
        return UserError(repo, f"there is no such repository, or this token may not see it ({status})", hint)
    text = " ".join(str(error).split())[:200].replace(get_token() or "\0", "…")
    if isinstance(error, HfHubHTTPError):
        return UserError(repo, f"the Hub refuses: {text}")
    if isinstance(error, ValueError) and "metadata in README.md" in text:
        return UserError(CARD, text, "change the header of the card beside the adapter")
    if _is_transport(error):
        return UserError(repo, f"the transfer broke off: {text or type(error).__name__}", "nothing was kept; try again")
    return _explained(error.__cause__, repo, writing) if error.__cause__ is not None else None


def _is_transport(error: BaseException) -> bool:
    """Whether an error is of the network: of the library's HTTP client, whichever it has, or of the system."""
    client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return (
        client or isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ == "LocalEntryNotFoundError"
    )
