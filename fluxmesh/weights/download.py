"""Fetches a model from the Hugging Face Hub into its cache: only the files that FLUX needs.

Stands below `hub.py`. An interrupted download goes on where it stopped; the free space is checked
before the first byte, and each large file's SHA-256 after the last. Every way in which this fails
becomes one sentence. Imports huggingface_hub when called, never before.

Not `snapshot_download`, which fetches several files at once. One file already takes as many
connections as help: hf_xet, which comes with huggingface_hub, fetches its pieces side by side. What
one after another gives: small files first, so that a wrong repository costs nothing; each hash
while the next file is yet to come, so that a damaged one is told at once and not after 30 GB; a
Ctrl-C that ends now, where threads would finish their files first; and a count of bytes, for the
one class that `snapshot_download` takes for its bars is asked to count files and bytes alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, OutputError, WeightsError
from fluxmesh.machine.awake import kept_awake
from fluxmesh.storage.hashing import sha256_of

Progress = Callable[[int, int], None]  # bytes done, bytes in all

FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "vae")
WEIGHTS = ("diffusion_pytorch_model", "model")
TOKENIZERS = (
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer_config.json",
)


def download_model(repo: str, cache: Path, progress: Progress | None = None) -> Path:
    """Fetches `repo` and returns the folder of its snapshot, which is named by the commit.

    Raises `ModelNotFoundError`, `OutputError` (disk full) or `WeightsError` (a file whose
    SHA-256 is not the Hub's; it is removed).
    """
    return _download(repo, cache, progress, needed_files)


def download_text_encoders(repo: str, cache: Path, progress: Progress | None = None) -> Path:
    """The same, without the transformer: what one of BFL's single files lacks."""

    def chosen(files: list[str]) -> list[str]:
        return [file for file in needed_files(files) if not file.startswith("transformer/")]

    return _download(repo, cache, progress, chosen)


def needed_files(files: list[str]) -> list[str]:
    """Of a repository's files, those that fluxmesh reads: the diffusers folder, else one file.

    Small files come first, so that a wrong repository is found out before 30 GB of it are here.
    """
    if "model_index.json" not in files:
        roots = [file for file in files if "/" not in file and file.endswith(".safetensors")]
        models = [file for file in roots if file != "ae.safetensors"]
        return roots if len(models) == 1 else []
    wanted = {"model_index.json", "fluxmesh.json", "scheduler/scheduler_config.json", *TOKENIZERS}
    chosen = [file for file in files if file in wanted]
    weights = []
    for folder in FOLDERS:
        chosen += [file for file in files if file == f"{folder}/config.json"]
        for stem in WEIGHTS:
            index = f"{folder}/{stem}.safetensors.index.json"
            if index in files:
                chosen.append(index)
                weights += [
                    file
                    for file in files
                    if file.startswith(f"{folder}/{stem}-") and file.endswith(".safetensors")
                ]
                break
            if f"{folder}/{stem}.safetensors" in files:
                weights.append(f"{folder}/{stem}.safetensors")
                break
    return chosen + weights


@kept_awake()
def _download(
    repo: str, cache: Path, progress: Progress | None, choose: Callable[[list[str]], list[str]]
) -> Path:
    with _one_sentence(repo, cache):
        import huggingface_hub

        endpoint = os.environ.get("HF_ENDPOINT")  # read now, not when the library was imported
        api = huggingface_hub.HfApi(endpoint=endpoint)
        info = api.model_info(repo, files_metadata=True)
        siblings = {file.rfilename: file for file in info.siblings or []}
        files = choose(list(siblings))
        if not files:
            raise ModelNotFoundError(
                f"{repo} holds neither a diffusers folder nor one single .safetensors file of "
                "FLUX.1; name another model."
            )
        sizes = {file: siblings[file].size or 0 for file in files}
        folder = cache / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / str(info.sha)
        missing = [file for file in files if not (snapshot / file).is_file()]
        total, left = sum(sizes.values()), sum(sizes[file] for file in missing)
        _check_space(repo, cache, left - _partial_bytes(folder))
        bar = _progress_bar(total - left, total, progress)
        for file in missing:
            path = huggingface_hub.hf_hub_download(
                repo, file, revision=info.sha, cache_dir=cache, endpoint=endpoint, tqdm_class=bar
            )
            lfs = siblings[file].lfs
            if lfs is not None:
                _check_hash(repo, Path(path), lfs.sha256)
        # the revision that `cached_snapshot` finds: written last, when every file is here
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(str(info.sha))
    return snapshot


def _partial_bytes(folder: Path) -> int:
    """Bytes of interrupted downloads, which go on and so need no space again."""
    return sum(file.stat().st_size for file in folder.glob("blobs/*.incomplete"))


def _check_space(repo: str, cache: Path, needed: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        # What macOS would clear by itself, such as local snapshots, only Finder counts as free.
        more = " (not what macOS would clear)" if platform.system() == "Darwin" else ""
        raise OutputError(
            f"{repo} needs {needed / 1e9:.1f} GB more and {cache} has {free / 1e9:.1f} GB free"
            f"{more}; free some, or set HF_HUB_CACHE to a folder on a larger disk."
        )


def _check_hash(repo: str, path: Path, expected: str) -> None:
    """The library checks sizes only; a flipped bit would show as a strange picture."""
    actual = sha256_of(path)
    if actual != expected:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise WeightsError(
            f"{path.name} of {repo} arrived damaged (its SHA-256 is wrong) and was removed; "
            "pull it again."
        )


def _progress_bar(done: int, total: int, progress: Progress | None) -> type[Any]:
    """A tqdm that prints nothing and tells `progress` how many bytes of the model are here."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        here = done  # shared by the bars of all files, which come one after another

        def __init__(self, *_args: Any, initial: int = 0, **_kwargs: Any) -> None:
            super().__init__(disable=True)
            self.update(initial)

        def update(self, n: float | None = 1) -> bool | None:
            Bar.here += int(n or 0)
            if progress is not None:
                progress(min(Bar.here, total), total)
            return None

    return Bar


@contextlib.contextmanager
def _one_sentence(repo: str, cache: Path) -> Iterator[None]:
    """Turns whatever the Hub's library raises into an error that says what to do."""
    try:
        yield
    except FluxmeshError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {repo} did not fit in {cache}; free some space and pull again, "
                "it goes on where it stopped."
            ) from error
        if isinstance(error, PermissionError):
            raise OutputError(f"Can't write into {cache}: {error.strerror}.") from error
        raise _not_found(repo, error) from error
    except (TypeError, AttributeError, NameError, LookupError, AssertionError):
        raise  # a defect, here or in the library: not the network's fault
    except Exception as error:  # the library's kinds changed with every major version
        raise _not_found(repo, error) from error


def _not_found(repo: str, error: Exception) -> ModelNotFoundError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run "
            "`hf auth login` (or set HF_TOKEN) and try again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"The Hub has no model {repo}, or it is private; check the spelling, or run "
            "`hf auth login`."
        )
    response = getattr(error, "response", None)
    if response is not None:
        status = response.status_code
        if status in (401, 403):
            return ModelNotFoundError(
                f"The Hub refuses {repo} (HTTP {status}); accept its licence at "
                f"https://huggingface.co/{repo} and run `hf auth login`."
            )
        return ModelNotFoundError(f"The Hub answered {status} for {repo}; try again later.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelNotFoundError(
            f"{repo} is not on this machine and HF_HUB_OFFLINE forbids fetching it; unset that, "
            "or name a model that is here (`fluxmesh models list`)."
        )
    return ModelNotFoundError(
        f"Can't fetch {repo} from the Hub ({type(error).__name__}); check the network and pull "
        "again, or name a model that is here (`fluxmesh models list`)."
    )
