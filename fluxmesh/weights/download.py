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
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, OutputError, WeightsError
from fluxmesh.machine.awake import kept_awake
from fluxmesh.models.files.family import Family, FolderFormat
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.registry import FAMILIES, NAMES
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.storage.safetensors import SUFFIXES, Entry, Header, read_header
from fluxmesh.weights import identify, mflux_folder, single_files
from fluxmesh.weights.checkpoint import described, family_in
from fluxmesh.weights.folder_files import INDEX, FolderFiles, files_of, vocabulary_in
from fluxmesh.weights.listing import Listing, remote_header
from fluxmesh.weights.reader import ComponentReader

Progress = Callable[[int, int], None]  # bytes done, bytes in all

Wanted = tuple[str, Sequence[str]]  # a repository, and which parts of it
Files = Sequence[tuple[Listing, Sequence[str]]]  # a repository's files by name

MAX_ROOTS = 24  # files of a repository without folders whose headers are asked for
WORTH_ASKING = 16 << 20  # bytes; a smaller file is fetched as soon as its header is


def repo_bytes(repo: str, cache: Path) -> int:
    """What a download of all that is needed of `repo` would fetch. Raises `ModelNotFoundError`."""
    with _one_sentence(repo, cache):
        listing = Listing.of(repo, cache)
        files = next(
            (files for files in _by_family(listing) if not files.missing),
            files_of(listing.sizes, FAMILIES[0].folder),
        )
        is_folder = INDEX in listing.sizes or files.is_mflux
        names = files.names if is_folder else set(remote_single_files(listing).file_of.values())
        return sum(listing.sizes[name] for name in names)


@dataclass(frozen=True)
class RemoteFiles:
    """The parts of a model that a repository holds as single files."""

    family: Family
    file_of: Mapping[str, str]  # by folder of a diffusers folder
    transformer: FileContents
    prefix: str  # before the names of its tensors


@kept_awake()
def download_model(
    repo: str,
    cache: Path,
    progress: Progress | None = None,
    lacking: Callable[[RemoteFiles], Sequence[Wanted]] = lambda files: (),
) -> Path:
    """Fetches `repo` and returns the folder of its snapshot, which is named by the commit.

    What the model lacks, and what its files are, is known from names and headers before the first
    weight comes. Of a repository without folders, `lacking` hears which parts of a model its files
    hold, and says what is to come from elsewhere. Raises `ModelNotFoundError`, `OutputError` (disk
    full) or `WeightsError` (a file of the wrong shapes, or whose SHA-256 is not the Hub's; the
    latter is removed).
    """
    with _one_sentence(repo, cache):
        listing = Listing.of(repo, cache)
        family = _family_of(listing)
        files = files_of(listing.sizes, family.folder)
        if INDEX in listing.sizes or files.is_mflux:
            if files.missing:
                raise ModelNotFoundError(
                    f"{repo} lacks {', '.join(files.missing)}, so that nothing of it was fetched; "
                    "name another model."
                )
            wanted: Files = [(listing, files.names)]
            _check_space(wanted)
            _fetch([(listing, files.small)], wanted, progress)
            check_remote(listing, files)
        else:
            single = remote_single_files(listing)
            others = [
                _parts_of(source, parts, cache, single.family) for source, parts in lacking(single)
            ]
            wanted = [*others, (listing, tuple(dict.fromkeys(single.file_of.values())))]
            _check_space(wanted)
        _fetch(wanted, wanted, progress)
        for fetched, _ in wanted:
            fetched.finish()
        return listing.snapshot


@kept_awake()
def download_parts(
    family: Family, sources: Sequence[Wanted], cache: Path, progress: Progress | None = None
) -> None:
    """Fetches folders of a family's models, or the vocabulary of a repository that is one.

    Raises as `download_model` does.
    """
    with _one_sentence(" and ".join(repo for repo, _ in sources), cache):
        wanted = [_parts_of(repo, parts, cache, family) for repo, parts in sources]
        _check_space(wanted)
        _fetch(wanted, wanted, progress)
        for listing, _ in wanted:
            listing.finish()


@kept_awake()
def download_files(
    repo: str,
    cache: Path,
    progress: Progress | None,
    choose: Callable[[list[str]], list[str]],
) -> Path:
    """Fetches the files that `choose` picks out of a repository's names, and no others.

    Returns the folder of its snapshot. `choose` may raise as it likes; else raises as
    `download_model` does.
    """
    with _one_sentence(repo, cache):
        listing = Listing.of(repo, cache)
        wanted = [(listing, tuple(choose(list(listing.sizes))))]
        _check_space(wanted)
        _fetch(wanted, wanted, progress)
        listing.finish()
        return listing.snapshot


def _parts_of(
    repo: str, parts: Sequence[str], cache: Path, family: Family
) -> tuple[Listing, tuple[str, ...]]:
    """The files that make these parts. Raises `ModelNotFoundError` where there are none."""
    listing = Listing.of(repo, cache)
    files = needed_parts(listing.sizes, parts, family.folder)
    if not files:
        raise ModelNotFoundError(f"{repo} has no {', '.join(parts)}; try again later.")
    return listing, tuple(files)


def needed_files(files: Collection[str], form: FolderFormat) -> list[str]:
    """Of the names in a diffusers folder's repository, those that fluxmesh reads."""
    return list(files_of(files, form).names)


def needed_parts(files: Collection[str], parts: Sequence[str], form: FolderFormat) -> list[str]:
    """The same of some folders alone; of a repository without folders, its vocabulary."""
    needed = [file for file in needed_files(files, form) if file.partition("/")[0] in parts]
    if needed:
        return needed
    for part in parts:
        choices = form.tokenizers[part].choices if part in form.tokenizers else ()
        vocabulary = vocabulary_in(files, choices) or ()
        needed += [*vocabulary, *({"tokenizer_config.json"} & set(files))] if vocabulary else []
    return needed


def remote_single_files(listing: Listing) -> RemoteFiles:
    """Of a repository without folders, the file of each part: of the one transformer, and others.

    Read from the headers, which are all that is fetched. Raises `ModelNotFoundError` that says what
    the file is where it is no transformer, or what there is where it is not one alone.
    """
    roots = [name for name in listing.sizes if "/" not in name and name.endswith(SUFFIXES)]
    files: list[tuple[FileContents, Family, dict[str, str]]] = []
    refused: list[FluxmeshError] = []
    for name in roots[:MAX_ROOTS]:
        try:
            file = identify.contents(Path(name), remote_header(listing, name))
            family = identify.family_of(file)
            files.append((file, family, identify.parts(file, family.files.name)))
        except (ModelNotFoundError, WeightsError) as error:
            refused.append(error)
    transformers = [known for known in files if "transformer" in known[2]]
    if len(transformers) > 1:
        names = ", ".join(str(file.path) for file, _, _ in transformers)
        raise ModelNotFoundError(
            f"{listing.repo} holds {len(transformers)} transformers ({names}); "
            f"fetch one with `hf download {listing.repo} FILE`, and name the file."
        )
    if not transformers:
        if len(refused) == 1:
            raise ModelNotFoundError(f"{listing.repo}: {refused[0]}")
        blocks = sorted(name for name in listing.sizes if name.endswith(".gguf"))
        if blocks:
            raise ModelNotFoundError(
                f"{listing.repo} holds GGUF files ({', '.join(blocks)}); fetch one with "
                f"`hf download {listing.repo} FILE`, and name the file."
            )
        raise ModelNotFoundError(
            f"{listing.repo} holds neither a diffusers folder nor one single .safetensors file of "
            f"{NAMES}; name another model."
        )
    transformer, family, prefixes = transformers[0]
    file_of = {"transformer": str(transformer.path)}
    for part in family.files.configs:
        names_of = [
            str(file.path) for file, other, parts in files if other is family and part in parts
        ]
        if names_of:
            usual = single_files.by_name(family.files.usual.get(part, ""))
            file_of.setdefault(part, min(names_of, key=usual))
    return RemoteFiles(family, file_of, transformer, prefixes["transformer"])


def _family_of(listing: Listing) -> Family:
    """By its model_index.json; of one without, the family that mflux knows.

    Raises `ModelNotFoundError` for a diffusers folder of another family, by its name.
    """
    if INDEX not in listing.sizes:
        return next(family for family in FAMILIES if family.mflux is not None)
    for files in _by_family(listing):  # by names alone, space is known before the first byte
        if not files.missing:
            _check_space([(listing, files.names)])
            break
    index = [(listing, (INDEX,))]
    _fetch(index, index, None)  # a few hundred bytes
    return family_in(listing.snapshot, listing.repo)


def _by_family(listing: Listing) -> Iterator[FolderFiles]:
    """What a repository has of a model of each family, by names; the one with most parts first."""
    for family in FAMILIES:
        yield files_of(listing.sizes, family.folder)


def check_remote(listing: Listing, files: FolderFiles) -> None:
    """Checks every large file's names and shapes against the configs, by its header alone."""
    folder = listing.snapshot
    if files.is_mflux:
        first = mflux_folder.FIRST
        if listing.missing([first]) and listing.sizes[first] >= WORTH_ASKING:
            mflux_folder.family_in_mflux(folder, remote_header(listing, first))
        return
    paths = {part: tuple(folder / name for name in files.weights[part]) for part in files.weights}
    checkpoint = described(folder, paths, listing.repo, listing.commit)
    for part in files.weights:
        names = files.weights[part]
        here = [name for name in names if (folder / name).is_file()]
        if all(name in here or listing.sizes[name] >= WORTH_ASKING for name in names):
            entries: dict[str, Entry] = {}
            for name in names:
                header = (
                    read_header(folder / name) if name in here else remote_header(listing, name)
                )
                entries |= header.entries
            ComponentReader(checkpoint, part, Header(entries))


def _fetch(files: Files, all_files: Files, progress: Progress | None) -> None:
    """Fetches those of `files` that are not here; `progress` counts `all_files`."""
    import huggingface_hub

    total = sum(listing.sizes[file] for listing, names in all_files for file in names)
    bar = _progress_bar(total - _left(all_files), total, progress)
    for listing, names in files:
        for file in listing.missing(names):
            path = huggingface_hub.hf_hub_download(
                listing.repo,
                file,
                revision=listing.commit,
                cache_dir=listing.cache,
                endpoint=listing.endpoint,
                tqdm_class=bar,
            )
            if file in listing.hashes:
                _check_hash(listing.repo, Path(path), listing.hashes[file])


def _left(files: Files) -> int:
    """Bytes that are not here yet."""
    return sum(listing.sizes[file] for listing, names in files for file in listing.missing(names))


def _partial_bytes(folder: Path) -> int:
    """Bytes of interrupted downloads, which go on and so need no space again."""
    return sum(file.stat().st_size for file in folder.glob("blobs/*.incomplete"))


def _check_space(files: Files) -> None:
    needed = _left(files) - sum(_partial_bytes(listing.folder) for listing, _ in files)
    repo, cache = files[-1][0].repo, files[-1][0].cache
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
