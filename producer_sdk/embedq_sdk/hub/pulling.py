"""From a repository of the hub to a directory below the model root."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec

from embedq_sdk.errors import EmbedError, InvalidArgument
from embedq_sdk.hub.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    digest,
    git_blob_id,
    read_manifest,
    write_manifest,
)

_ID: Final = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_NAME: Final = re.compile(r"[\w.@-]{1,96}(/[\w.@-]{1,96}){0,3}", re.ASCII)
_KEPT: Final = frozenset({".json", ".txt", ".model", ".safetensors", ".md", ".jinja"})
"""What a model directory needs, and its README. Pickled weights, and copies for other runtimes, are left where they are."""
_OTHER_RUNTIMES: Final = frozenset({"onnx", "openvino", "coreml", "tf", "flax", "gguf"})
"""Folders of such copies, which may hold safetensors and JSON too."""
_SPARE: Final = 1.02
"""Free space that is asked for, for each byte: file systems need some themselves."""


class PullFailed(EmbedError):
    """{repository} was not pulled: {reason}"""

    repository: str
    reason: str


class Pulled(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is there now. `fetched` is False if it was there already."""

    name: str
    """What `embedq reload` calls it."""
    directory: Path
    manifest: Manifest
    fetched: bool


class _Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub describes it."""

    path: str
    size: int
    sha256: str | None
    """Of files in large-file storage."""
    blob_id: str | None
    """git's, of the others."""


def pull(
    repository: str,
    root: Path,
    *,
    revision: str | None = None,
    name: str | None = None,
    endpoint: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Pulled:
    """Fetch a model into `root`/`name`, which is there afterwards whole, or not at all. A pull that was interrupted goes on where it
    ended. Blocks for as long as it takes.

    A directory that is there already is compared with its manifest, without the hub; it is never changed.

    Args:
        repository: the hub's id, such as "Qwen/Qwen3-Embedding-0.6B".
        root: the service's model root.
        revision: a branch, a tag or a commit. Default: main, or what is there.
        name: of the directory, below the root. Default: the id.
        endpoint: of another hub. Default: the environment's HF_ENDPOINT, else the public one.
        tell: is given a line for each file.

    Raises:
        InvalidArgument: an argument cannot be used.
        PullFailed: for any other reason.
    """
    if not _ID.fullmatch(repository) or ".." in repository:
        raise InvalidArgument(
            argument="ID", expected="a model of the hub, such as ORGANIZATION/NAME", got=repr(repository)
        )
    name = name or repository
    if not _NAME.fullmatch(name) or any(part.startswith(".") for part in name.split("/")):
        raise InvalidArgument(argument="name", expected="a directory below the model root", got=repr(name))
    if not root.is_dir():
        raise InvalidArgument(argument="root", expected="a directory", got=str(root))
    target = root / name
    if target.exists():
        return Pulled(
            name=name,
            directory=target,
            manifest=_found(repository, revision, target, tell),
            fetched=False,
        )
    hub = _Hub(repository, endpoint)
    commit, files = hub.look(revision)
    chosen = _chosen(repository, files)
    # A directory of the same file system, so that the last step is a rename; its name is the commit's, so that a pull goes on.
    partial = root / f".pull-{name.replace('/', '--')}-{commit[:12]}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _refuse_without_space(repository, chosen, partial)
        manifest = Manifest(
            repository=repository,
            revision=commit,
            endpoint=hub.endpoint,
            files=tuple(hub.fetch(file, commit, partial, tell) for file in chosen),
        )
        write_manifest(partial, manifest)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own notes
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
    except OSError as error:
        raise PullFailed(repository=repository, reason=_first_line(error)) from error
    return Pulled(name=name, directory=target, manifest=manifest, fetched=True)


class _Hub:
    """The hub's client, whose failures become `PullFailed`."""

    def __init__(self, repository: str, endpoint: str | None) -> None:
        try:
            import huggingface_hub
        except ModuleNotFoundError:
            raise PullFailed(
                repository=repository, reason="huggingface_hub is missing: pip install 'embedq[hub]'"
            ) from None
        self._client: Any = huggingface_hub
        self._repository = repository
        self._api = huggingface_hub.HfApi(endpoint=endpoint, library_name="embedq")
        self.endpoint: str = self._api.endpoint

    def look(self, revision: str | None) -> tuple[str, list[_Remote]]:
        """The commit that a revision stands for, and its files."""
        try:
            info = self._api.model_info(self._repository, revision=revision, files_metadata=True)
        except Exception as error:  # of whichever HTTP client it uses
            raise self._failed(error, revision) from error
        files = [
            _Remote(
                path=file.rfilename,
                size=file.size or 0,
                sha256=file.lfs.sha256 if file.lfs else None,
                blob_id=None if file.lfs else file.blob_id,
            )
            for file in info.siblings or []
        ]
        return str(info.sha), files

    def fetch(self, file: _Remote, commit: str, directory: Path, tell: Callable[[str], None]) -> ManifestFile:
        """One file, checked by the hub's digest."""
        tell(f"{file.path}: {file.size:,} bytes")
        try:
            path = Path(
                self._client.hf_hub_download(
                    self._repository, file.path, revision=commit, local_dir=directory, endpoint=self.endpoint
                )
            )
        except Exception as error:
            raise self._failed(error, commit) from error
        found = digest(path)
        if path.stat().st_size != file.size or not _agrees(file, path, found):
            path.unlink()
            raise PullFailed(
                repository=self._repository, reason=f"{file.path} is not what the hub says it is; pull again"
            )
        return ManifestFile(path=file.path, size=file.size, sha256=found)

    def _failed(self, error: Exception, revision: str | None) -> PullFailed:
        errors = self._client.errors
        if isinstance(error, errors.GatedRepoError):
            reason = "its owner lets nobody in without being asked: ask on its page, then set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"it has no revision {revision}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"{self.endpoint} has no such model, or it is private: then set HF_TOKEN"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(error, errors.HfHubHTTPError):
            reason = f"{self.endpoint} answers {error.response.status_code}"
        else:
            reason = f"{self.endpoint} cannot be reached ({type(error).__name__}: {_first_line(error)})"
        return PullFailed(repository=self._repository, reason=reason)


def _found(repository: str, revision: str | None, target: Path, tell: Callable[[str], None]) -> Manifest:
    """The manifest of a directory that is there already, if the directory is what it should be."""
    manifest = read_manifest(target)
    if manifest is None:
        raise PullFailed(
            repository=repository, reason=f"{target} is there, and was not pulled; choose another --name"
        )
    if manifest.repository != repository or revision not in (None, manifest.revision):
        raise PullFailed(
            repository=repository,
            reason=f"{target} holds {manifest.repository} at {manifest.revision}; choose another --name: what is served "
            "must not change in place",
        )
    tell(f"{target} is there: comparing {len(manifest.files)} files with {MANIFEST}")
    if problems := list(manifest.problems(target)):
        raise PullFailed(
            repository=repository,
            reason=f"{target} is there, but not as it was pulled ({'; '.join(problems)}); remove it, then pull again",
        )
    return manifest


def _chosen(repository: str, files: Iterable[_Remote]) -> Sequence[_Remote]:
    """What a model directory needs of a repository, small files first: what is wrong shows before gigabytes are there."""
    chosen = [file for file in files if _is_needed(PurePosixPath(file.path))]
    names = {file.path for file in chosen}
    if not any(name.endswith(".safetensors") for name in names):
        raise PullFailed(
            repository=repository, reason="it has no safetensors weights; pickled ones are never loaded"
        )
    if not names & {"config.json", "adapter_config.json", "modules.json"}:
        raise PullFailed(
            repository=repository, reason="it has no config.json: it is no model of transformers"
        )
    return sorted(chosen, key=lambda file: (file.size, file.path))


def _is_needed(path: PurePosixPath) -> bool:
    """Whether a file belongs into a model directory. The hub's names come from outside: none may lead out of it."""
    safe = (
        not path.is_absolute() and ".." not in path.parts and not any(p.startswith(".") for p in path.parts)
    )
    return safe and path.suffix in _KEPT and not _OTHER_RUNTIMES & set(path.parts[:-1])


def _refuse_without_space(repository: str, files: Sequence[_Remote], partial: Path) -> None:
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    needed = int(_SPARE * max(0, sum(file.size for file in files) - there))
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise PullFailed(
            repository=repository,
            reason=f"it needs {needed:,} bytes more, and {partial.parent} has {free:,} free",
        )


def _agrees(file: _Remote, path: Path, sha256: str) -> bool:
    if file.sha256 is not None:
        return file.sha256 == sha256
    return file.blob_id is None or file.blob_id == git_blob_id(path)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def default_root(environ: os._Environ[str] = os.environ) -> Path | None:
    """The service's model root by its own settings; None where neither is set."""
    if root := environ.get("EMBEDQ_MODEL_ROOT"):
        return Path(root)
    model = environ.get("EMBEDQ_MODEL")
    return Path(model).resolve().parent if model else None
